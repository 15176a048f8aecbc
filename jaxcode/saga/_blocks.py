"""SAGA on linear models, several steps at a time.

A step of SAGA on a linear model adds a multiple of the sample to the parameters, and what the next steps need of these
are their samples' margins only. Those follow from the margins before the first step and the samples' products with each
other: a block of steps is two products of matrices and a loop over a few numbers. The same steps as one by one, but for
rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from .linear import SparseRows

# Steps in a block. Their products with each other grow with its square, what it costs to begin one does not.
_BLOCK = 32


class Walk(NamedTuple):
    """Where a machine is.

    Attributes:
        w: Parameters, (d,) or (d, classes).
        moved: What the sum of all gradients in the table has changed by, like w.
        table: Slopes of samples, (m,) or (m, classes).
    """

    w: Array
    moved: Array
    table: Array


def walk_in_blocks(
    begin: Walk,
    slope: Callable[[Array, Any], Array],
    samples: tuple[Float[Array, "m d"] | SparseRows, Any],
    index: Integer[Array, "steps"],
    mean: Array,
    weight: Float[Array, ""],
    ridge: Float[Array, ""],
    step_size: Float[Array, ""],
    here: Bool[Array, ""],
    bias: bool,
) -> Walk:
    r"""Goes one step with each sample.

    .. math::
        \delta = \ell'(x_j \cdot w) - a_j, \quad
        w \leftarrow w - \gamma (\delta x_j + c + \theta D + \lambda w), \quad D \leftarrow D + \delta x_j, \quad
        a_j \leftarrow a_j + \delta

    Args:
        begin: Where it is.
        slope: The derivative of the loss with respect to the margin, of a margin and a target.
        samples: All of the machine's.
        index: Which of them, in this order.
        mean: c, like w.
        weight: :math:`\theta`.
        ridge: :math:`\lambda`.
        step_size: :math:`\gamma`.
        here: Whether the table is to change at all; if not, w is not to be used.
        bias: Whether the last row of w is that of ones beside the samples.

    Returns:
        Where it is then.
    """
    whole, rest = divmod(index.size, _BLOCK)

    def go(at, chosen):
        return _block(at, chosen, slope, samples, mean, weight, ridge, step_size, here, bias)

    at = begin
    if whole:
        blocks = index[: whole * _BLOCK].reshape(whole, _BLOCK)
        at = jax.lax.fori_loop(0, whole, lambda b, at: go(at, blocks[b]), at)
    return go(at, index[whole * _BLOCK :]) if rest else at


def _block(at, chosen, slope, samples, mean, weight, ridge, step_size, here, bias):
    x, y = jax.tree.map(lambda leaf: leaf[chosen], samples)
    if isinstance(x, SparseRows):
        rows = jnp.arange(chosen.size)[:, None]
        x = jnp.zeros((chosen.size, x.num_columns), x.values.dtype).at[rows, x.indices].add(x.values)
    if bias:
        x = jnp.concatenate([x, jnp.ones((chosen.size, 1), x.dtype)], axis=1)
    steps, order = chosen.size, jnp.arange(chosen.size)
    # What is left after k steps, and of what is taken off in each of k steps.
    decay = (1 - step_size * ridge) ** jnp.arange(steps + 1, dtype=x.dtype)
    taken = jnp.concatenate([jnp.zeros(1, x.dtype), jnp.cumsum(decay)])
    pull = mean + weight * at.moved

    between = order - 1 - order[:, None]
    after = step_size * jnp.where(between >= 0, decay[between] + weight * taken[between], 0)
    effect = after * (x @ x.T)
    margins = _rows(decay[:steps], x @ at.w) - step_size * _rows(taken[:steps], x @ pull)
    same = chosen[:, None] == chosen

    def step(t, carry):
        margins, held, new = carry
        of_sample = jnp.where(here, slope(margins[t], jax.tree.map(lambda leaf: leaf[t], y)), held[t])
        margins = margins - jnp.multiply.outer(effect[t], of_sample - held[t])
        # Whoever is drawn again finds what was just written.
        held = jnp.where(_like(same[t] & (order > t), held), of_sample, held)
        return margins, held, new.at[t].set(of_sample)

    held = at.table[chosen]
    _, held, new = jax.lax.fori_loop(0, steps, step, (margins, held, jnp.zeros_like(held)))
    change = new - held
    last = step_size * (decay[steps - 1 - order] + weight * taken[steps - 1 - order])
    w = decay[steps] * at.w - step_size * taken[steps] * pull - jnp.tensordot(_rows(last, change), x, (0, 0)).T
    moved = at.moved + jnp.tensordot(change, x, (0, 0)).T
    newest = jnp.max(jnp.where(same, order, 0), axis=1)
    return Walk(w, moved, at.table.at[chosen].set(new[newest]))


def _like(mask, leaf):
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))


def _rows(factors, matrix):
    return _like(factors, matrix) * matrix
