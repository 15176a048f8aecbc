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

from ._tables import along
from .linear import SparseRows

# Steps in a block. Their products with each other grow with its square, what it costs to begin one does not.
_BLOCK = 32


class Walk(NamedTuple):
    """Where a machine is.

    Attributes:
        w: Parameters of each class, (classes, d).
        moved: What the sum of all gradients in the table has changed by, (classes, d).
        table: Slopes of samples, (m,) or (m, classes).
    """

    w: Float[Array, "classes d"]
    moved: Float[Array, "classes d"]
    table: Array


def walk_in_blocks(
    begin: Walk,
    slope: Callable[[Array, Any], Array],
    samples: tuple[Float[Array, "m features"] | SparseRows, Any],
    index: Integer[Array, "steps"],
    scale: Float[Array, "steps"],
    mean: Float[Array, "classes d"],
    weight: Float[Array, ""],
    ridge: Float[Array, ""],
    step_size: Float[Array, ""],
    here: Bool[Array, ""],
    bias: bool,
) -> Walk:
    r"""Goes one step with each sample.

    .. math::
        \delta = \ell'(x_j \cdot w) - a_j, \quad
        w \leftarrow w - \gamma (q \delta x_j + c + \theta D + \lambda w), \quad D \leftarrow D + \delta x_j, \quad
        a_j \leftarrow a_j + \delta

    Args:
        begin: Where it is.
        slope: The derivative of the loss with respect to the margin, of a margin and a target.
        samples: All of the machine's.
        index: Which of them, in this order.
        scale: q, of each step.
        mean: c.
        weight: :math:`\theta`.
        ridge: :math:`\lambda`.
        step_size: :math:`\gamma`.
        here: Whether the table is to change at all; if not, w is not to be used.
        bias: Whether the last column of w is that of ones beside the samples.

    Returns:
        Where it is then.
    """
    whole, rest = divmod(index.size, _BLOCK)

    def go(steps):
        factors = _factors(steps, weight, ridge, step_size, mean.dtype)
        return lambda at, chosen, scale: _block(at, chosen, scale, factors, slope, samples, mean, weight, here, bias)

    at = begin
    if whole:
        blocks, scales = (part[: whole * _BLOCK].reshape(whole, _BLOCK) for part in (index, scale))
        one = go(_BLOCK)
        at = jax.lax.fori_loop(0, whole, lambda b, at: one(at, blocks[b], scales[b]), at)
    return go(rest)(at, index[whole * _BLOCK :], scale[whole * _BLOCK :]) if rest else at


class _Factors(NamedTuple):
    r"""What is the same in all blocks of so many steps, with :math:`\rho = 1 - \gamma \lambda`.

    Attributes:
        decay: What is left of w before step t, :math:`\rho^t`.
        taken: What has been taken off by then, of the part of the estimate that stays:
            :math:`\gamma \sum_{i < t} \rho^i`.
        own: Of the change of slope in step s, times q, what is taken off before step t: :math:`\gamma \rho^{t-1-s}`.
        since: The same of what it adds to D: :math:`\gamma \theta \sum_{i < t-1-s} \rho^i`.
        last: Both after the last step.
        end: decay and taken after the last step.
    """

    decay: Array
    taken: Array
    own: Array
    since: Array
    last: tuple[Array, Array]
    end: tuple[Array, Array]


def _factors(steps, weight, ridge, step_size, dtype):
    decay = (1 - step_size * ridge) ** jnp.arange(steps + 1, dtype=dtype)
    sums = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(decay)])
    order = jnp.arange(steps)
    between = order - 1 - order[:, None]
    # Of a slope after so many steps.
    own, since = step_size * decay, step_size * weight * sums
    last = steps - 1 - order
    return _Factors(
        decay[:steps],
        step_size * sums[:steps],
        jnp.where(between >= 0, own[between], 0),
        jnp.where(between >= 0, since[between], 0),
        (own[last], since[last]),
        (decay[steps], step_size * sums[steps]),
    )


def _block(at, chosen, scale, factors, slope, samples, mean, weight, here, bias):
    x, y = jax.tree.map(lambda leaf: leaf[chosen], samples)
    steps = chosen.size
    if isinstance(x, SparseRows):
        rows = jnp.arange(steps)[:, None]
        x = jnp.zeros((steps, x.num_columns), x.values.dtype).at[rows, x.indices].add(x.values)
    if bias:
        x = jnp.concatenate([x, jnp.ones((steps, 1), x.dtype)], axis=1)
    stays, held = mean + weight * at.moved, at.table[chosen]
    of_w, of_stays = (part.T.reshape(held.shape) for part in jnp.split(jnp.concatenate([at.w, stays]) @ x.T, 2))
    margins = _rows(factors.decay, of_w) - _rows(factors.taken, of_stays)
    # What a step's change of slope does: to the margins of those after it, to what the table holds for every step with
    # the same sample, and to the record of changes.
    effect = jnp.stack(
        [
            -(scale[:, None] * factors.own + factors.since) * (x @ x.T),
            (chosen[:, None] == chosen).astype(x.dtype),
            jnp.eye(steps, dtype=x.dtype),
        ],
        axis=1,
    )

    def step(t, state):
        margins, held, _ = state
        change = slope(margins[t], jax.tree.map(lambda leaf: leaf[t], y)) - held[t]
        change = jnp.where(here, change, 0)
        return state + jnp.multiply.outer(effect[t], change)

    state = jnp.stack([margins, held, jnp.zeros_like(held)])
    _, held, change = jax.lax.fori_loop(0, steps, step, state)
    change = change.reshape(steps, -1)
    own, since = factors.last
    ahead, moved = jnp.split(jnp.concatenate([_rows(scale * own + since, change), change], axis=1).T @ x, 2)
    decay, taken = factors.end
    return Walk(decay * at.w - taken * stays - ahead, at.moved + moved, at.table.at[chosen].set(held))


def _rows(factors, matrix):
    return along(factors, matrix) * matrix
