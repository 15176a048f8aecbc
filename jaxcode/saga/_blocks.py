"""SAGA on linear models, several steps at a time.

A step of SAGA on a linear model adds a multiple of the sample to the parameters, and what the next steps need of these
are their samples' margins only. Those follow from the margins before the first step and the samples' products with each
other: a block of steps is two products of matrices and a loop over a few numbers. Margins of sparse samples cost next
to nothing, and a block of steps is one after the other, without touching the large table. The same steps either way,
but for rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from ._tables import along
from .linear import SparseRows

# Steps in a block. What it costs to begin one does not grow with them; products with each other do, with their square.
_STEPS_WITH_DENSE_ROWS = 32
_STEPS_WITH_SPARSE_ROWS = 64


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
    x, y = samples
    sparse = isinstance(x, SparseRows)
    size = _STEPS_WITH_SPARSE_ROWS if sparse else _STEPS_WITH_DENSE_ROWS
    whole, rest = divmod(index.size, size)

    def block(steps):
        factors = None if sparse else _factors(steps, weight, ridge, step_size, mean.dtype)

        def go(at, chosen, scale):
            rows, targets = jax.tree.map(lambda leaf: leaf[chosen], (x, y))
            both = at, rows, targets, chosen, scale, slope, mean, weight
            if factors is None:
                return _sparse_block(*both, ridge, step_size, here=here, bias=bias)
            return _dense_block(*both, factors, here=here, bias=bias)

        return go

    at = begin
    if whole:
        blocks, scales = (part[: whole * size].reshape(whole, size) for part in (index, scale))
        one = block(size)
        at = jax.lax.fori_loop(0, whole, lambda b, at: one(at, blocks[b], scales[b]), at)
    return block(rest)(at, index[whole * size :], scale[whole * size :]) if rest else at


def _sparse_block(at, rows, targets, chosen, scale, slope, mean, weight, ridge, step_size, *, here, bias):
    """One step after the other: margins take a few products each."""
    steps, shape = chosen.size, at.table.shape[1:]
    x = jnp.zeros((steps, rows.num_columns + bias), rows.values.dtype)
    x = x.at[jnp.arange(steps)[:, None], rows.indices].add(rows.values)
    if bias:
        x = x.at[:, -1].set(1)
    # Of w and D together: what is left of each, what D does to w, what is always added, and the share of the change.
    one, zero = jnp.ones_like(step_size), jnp.zeros_like(step_size)
    left, of_moved = (
        jnp.stack(two)[:, None, None] for two in ((1 - step_size * ridge, one), (-step_size * weight, zero))
    )
    always = jnp.stack([-step_size * mean, jnp.zeros_like(mean)])

    def step(t, carry):
        both, held = carry
        w, moved = both
        margins = jnp.sum(w[:, rows.indices[t]] * rows.values[t], axis=1)
        if bias:
            margins = margins + w[:, -1]
        change = slope(margins.reshape(shape), jax.tree.map(lambda leaf: leaf[t], targets)) - held[t]
        change = jnp.where(here, change, 0)
        share = jnp.stack([-step_size * scale[t], one])[:, None, None]
        both = left * both + of_moved * moved + always + share * (change.reshape(-1, 1) * x[t])
        # Whoever is drawn again finds what was just written.
        return both, held + jnp.where(along(chosen == chosen[t], held), change, 0)

    (w, moved), held = jax.lax.fori_loop(0, steps, step, (jnp.stack([at.w, at.moved]), at.table[chosen]))
    return Walk(w, moved, at.table.at[chosen].set(held))


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


def _dense_block(at, x, targets, chosen, scale, slope, mean, weight, factors, *, here, bias):
    """All steps' margins from products of matrices."""
    steps = chosen.size
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
        change = slope(margins[t], jax.tree.map(lambda leaf: leaf[t], targets)) - held[t]
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
