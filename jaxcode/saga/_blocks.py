"""SAGA on linear models, several steps at a time.

A step of SAGA on a linear model adds a multiple of the sample to the parameters, and what the next steps need of these
are their samples' margins only. Those follow from the margins before the first step and the samples' products with each
other: a block of steps is two products of matrices and a loop over a few numbers. Margins of sparse samples cost next
to nothing, and a block of steps is one after the other, without touching the large table. The same steps either way,
but for rounding.

On a CPU a step is so short that what counts is how many kernels XLA makes of it (above eight, they go through its
scheduler and take twice as long: loops are not unrolled), and that none of them copies. A quotient it works out once, a
difference for each use: so a step's change of slope is divided by one, and what only this quotient reads elsewhere is
changed in place.
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
# With more columns for each entry of a row, a block goes over those that it has entries in; beginning one costs more.
_MOST_COLUMNS_PER_ENTRY = 64
_STEPS_WITH_WIDE_ROWS = 32
# Steps whose sparse rows are fetched at once, a multiple of those in a block.
_STEPS_FETCHED = 1024


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
        here: Whether the table is to change at all; if not, w and D are not to be used.
        bias: Whether the last column of w is that of ones beside the samples.

    Returns:
        Where it is then.
    """
    x, _ = samples
    rule = _Rule(slope, mean, weight, ridge, step_size, here, bias)
    if not isinstance(x, SparseRows):

        def dense(at, index, scale):
            return _dense_block(at, _chosen(samples, index), index, scale, rule)

        return _in_pieces(dense, begin, (index, scale), _STEPS_WITH_DENSE_ROWS)

    wide = x.num_columns > _MOST_COLUMNS_PER_ENTRY * x.indices.shape[-1]
    block, steps = (_wide_block, _STEPS_WITH_WIDE_ROWS) if wide else (_sparse_block, _STEPS_WITH_SPARSE_ROWS)

    def sparse(at, chosen, index, scale):
        return block(at, chosen, index, scale, rule)

    def fetch(at, index, scale):
        return _in_pieces(sparse, at, (_chosen(samples, index), index, scale), steps)

    return _in_pieces(fetch, begin, (index, scale), _STEPS_FETCHED)


class _Rule(NamedTuple):
    """What is the same in all steps: as `walk_in_blocks` is given it."""

    slope: Callable[[Array, Any], Array]
    mean: Array
    weight: Array
    ridge: Array
    step_size: Array
    here: Array
    bias: bool

    def changed(self, new, old):
        # Divided by one, or what XLA cannot know to be one.
        return jnp.where(self.here, new - old, 0) / jnp.where(self.here, jnp.ones_like(self.step_size), 2)


def _in_pieces(go, at, along, size):
    """Goes on with so many of what it needs at once, and with the rest."""
    whole, rest = divmod(jax.tree.leaves(along)[0].shape[0], size)

    def cut(first, size):
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size), along)

    if whole:
        at = jax.lax.fori_loop(0, whole, lambda piece, at: go(at, *cut(piece * size, size)), at)
    return go(at, *cut(whole * size, rest)) if rest else at


def _chosen(samples, index):
    return jax.tree.map(lambda leaf: leaf[index], samples)


def _sparse_block(at, samples, index, scale, rule):
    """One step after the other: margins take a few products each."""
    rows, targets = samples
    steps, step_size = index.size, rule.step_size
    x = jnp.zeros((steps, rows.num_columns + rule.bias), rows.values.dtype)
    x = x.at[jnp.arange(steps)[:, None], rows.indices].add(rows.values)
    if rule.bias:
        x = x.at[:, -1].set(1)
    left, always = 1 - step_size * rule.ridge, -step_size * rule.mean

    def step(t, carry):
        w, moved, held = carry
        margins = jnp.sum(w[:, rows.indices[t]] * rows.values[t], axis=1)
        if rule.bias:
            margins = margins + w[:, -1]
        old, target = jax.tree.map(lambda leaf: leaf[t], (held, targets))
        change = rule.changed(rule.slope(margins.reshape(old.shape), target), old)
        toward = change.reshape(-1, 1) * x[t]
        moved = moved + toward
        # Of D as it is by now: as it was before, it would have to be copied.
        w = left * w + always - (step_size * rule.weight) * moved + (step_size * (rule.weight - scale[t])) * toward
        # Whoever is drawn again finds what was just written.
        return w, moved, held + jnp.where(along(index == index[t], held), change, 0)

    w, moved, held = jax.lax.fori_loop(0, steps, step, (at.w, at.moved, at.table[index]))
    return Walk(w, moved, at.table.at[index].set(held))


def _wide_block(at, samples, index, scale, rule):
    """One step after the other, on the columns that these samples have entries in; the others go all steps at once."""
    rows, targets = samples
    columns = rows.indices.ravel()
    if rule.bias:
        columns = jnp.append(columns, rows.num_columns)
    # One place for each column, whichever of those it is at.
    place = jnp.zeros(at.w.shape[1], jnp.int32).at[columns].set(jnp.arange(columns.size, dtype=jnp.int32))[columns]
    narrow = SparseRows(place[: rows.indices.size].reshape(rows.indices.shape), rows.values, rows.indices.size)
    begin = Walk(at.w[:, columns], at.moved[:, columns], at.table)
    end = _sparse_block(begin, (narrow, targets), index, scale, rule._replace(mean=rule.mean[:, columns]))
    decay, taken = _factors(index.size, rule).end
    w = decay * at.w - taken * (rule.mean + rule.weight * at.moved)
    w, moved = (leaf.at[:, columns].set(ours[:, place]) for leaf, ours in ((w, end.w), (at.moved, end.moved)))
    return Walk(w, moved, end.table)


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


def _factors(steps, rule):
    step_size, dtype = rule.step_size, rule.mean.dtype
    decay = (1 - step_size * rule.ridge) ** jnp.arange(steps + 1, dtype=dtype)
    sums = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(decay)])
    order = jnp.arange(steps)
    between = order - 1 - order[:, None]
    # Of a slope after so many steps.
    own, since = step_size * decay, step_size * rule.weight * sums
    last = steps - 1 - order
    return _Factors(
        decay[:steps],
        step_size * sums[:steps],
        jnp.where(between >= 0, own[between], 0),
        jnp.where(between >= 0, since[between], 0),
        (own[last], since[last]),
        (decay[steps], step_size * sums[steps]),
    )


def _dense_block(at, samples, index, scale, rule):
    """All steps' margins from products of matrices."""
    x, targets = samples
    steps = index.size
    factors = _factors(steps, rule)
    if rule.bias:
        x = jnp.concatenate([x, jnp.ones((steps, 1), x.dtype)], axis=1)
    stays, held = rule.mean + rule.weight * at.moved, at.table[index]
    of_w, of_stays = (part.T.reshape(held.shape) for part in jnp.split(jnp.concatenate([at.w, stays]) @ x.T, 2))
    margins = _rows(factors.decay, of_w) - _rows(factors.taken, of_stays)
    # What a step's change of slope does: to the margins of those after it, to what the table holds for every step with
    # the same sample, and to the record of changes.
    effect = jnp.stack(
        [
            -(scale[:, None] * factors.own + factors.since) * (x @ x.T),
            (index[:, None] == index).astype(x.dtype),
            jnp.eye(steps, dtype=x.dtype),
        ],
        axis=1,
    )

    def step(t, state):
        margins, held, _ = state
        change = rule.changed(rule.slope(margins[t], jax.tree.map(lambda leaf: leaf[t], targets)), held[t])
        return state + jnp.multiply.outer(effect[t], change)

    state = jnp.stack([margins, held, jnp.zeros_like(held)])
    _, held, change = jax.lax.fori_loop(0, steps, step, state)
    change = change.reshape(steps, -1)
    own, since = factors.last
    ahead, moved = jnp.split(jnp.concatenate([_rows(scale * own + since, change), change], axis=1).T @ x, 2)
    decay, taken = factors.end
    return Walk(decay * at.w - taken * stays - ahead, at.moved + moved, at.table.at[index].set(held))


def _rows(factors, matrix):
    return along(factors, matrix) * matrix
