"""Computes steps of SAGA on a linear model in blocks.

A step of SAGA on a linear model adds a multiple of the sample to the parameters, and all that later steps need of the
parameters is their samples' margins. Those follow from the margins before the first step and the samples' inner
products: a block of steps is two products of matrices and a loop over a few numbers. Margins of sparse samples cost
next to nothing, so that a block of them is a loop over steps that does not touch the large table. The steps are the
same either way, except for rounding.

On a CPU a step is so short that its cost is the number of kernels into which XLA divides it and the copies they make.
Above eight kernels, XLA uses its scheduler, which takes twice as long, so loops are not unrolled.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from ._tables import append_axes
from .sparse import SparseRows

# Steps in a block. More steps share the constant cost of beginning it, but inner products of dense rows and comparisons
# of the samples that steps draw grow quadratically. `python -m tests.benchmarks.training` times an epoch.
_STEPS_WITH_DENSE_ROWS = 32
_STEPS_WITH_SPARSE_ROWS = 64
# With more columns for each entry of a row, a block uses only the columns in which its samples have entries: to gather
# and scatter them takes longer than to update few columns, and less time than to update many.
_MAX_COLUMNS_PER_ENTRY = 64
# Steps in such a block, whose columns increase with its steps.
_STEPS_WITH_WIDE_ROWS = 32
# Steps whose sparse rows are fetched together, a multiple of those in a block: memory against the number of fetches.
_STEPS_FETCHED = 1024


class Iterate(NamedTuple):
    """Holds the variables that a machine's steps change.

    Attributes:
        w: Parameters of each class, (classes, d).
        sum_change: The change of the sum of all gradients in the table, (classes, d).
        table: Slopes of samples, (m,) or (m, classes).
    """

    w: Float[Array, "classes d"]
    sum_change: Float[Array, "classes d"]
    table: Array


def blocked_steps(
    start: Iterate,
    slope: Callable[[Array, Any], Array],
    samples: tuple[Float[Array, "m features"] | SparseRows, Any],
    index: Integer[Array, "steps"],
    scale: Float[Array, "steps"],
    mean: Float[Array, "classes d"],
    weight: Float[Array, ""],
    ridge: Float[Array, ""],
    step_size: Float[Array, ""],
    active: Bool[Array, ""],
    bias: bool,
) -> Iterate:
    r"""Computes one step with each of the samples given by index.

    .. math::
        \delta = \ell'(x_j \cdot w) - a_j, \quad
        w \leftarrow w - \gamma (q \delta x_j + c + \theta D + \lambda w), \quad D \leftarrow D + \delta x_j, \quad
        a_j \leftarrow a_j + \delta

    Args:
        start: w, D (`sum_change`) and a (`table`) before the first step.
        slope: :math:`\ell'`, the derivative of the loss with respect to the margin, from a margin and a label.
        samples: x and labels, all of the machine's.
        index: j, the sample of each step.
        scale: q, of each step.
        mean: c, the part of the gradient estimate that is constant.
        weight: :math:`\theta`, the factor of D in the gradient estimate.
        ridge: :math:`\lambda`, the factor of w in the gradient.
        step_size: :math:`\gamma`.
        active: Whether the table changes at all: if not, :math:`\delta` is zero, and w and D are not to be used.
        bias: Whether the last column of w belongs to a column of ones that samples do not contain.

    Returns:
        The iterate after the last step.
    """
    x, _ = samples
    constants = _Constants(slope, mean, weight, ridge, step_size, active, bias)
    if not isinstance(x, SparseRows):

        def compute_dense(iterate, index, scale):
            return _dense_block(iterate, _take(samples, index), index, scale, constants)

        return _fold(compute_dense, start, (index, scale), _STEPS_WITH_DENSE_ROWS)

    is_wide = x.num_columns > _MAX_COLUMNS_PER_ENTRY * x.indices.shape[-1]
    block, steps = (_wide_block, _STEPS_WITH_WIDE_ROWS) if is_wide else (_sparse_block, _STEPS_WITH_SPARSE_ROWS)

    def compute_sparse(iterate, block_samples, index, scale):
        return block(iterate, block_samples, index, scale, constants)

    def fetch_and_compute(iterate, index, scale):
        return _fold(compute_sparse, iterate, (_take(samples, index), index, scale), steps)

    return _fold(fetch_and_compute, start, (index, scale), _STEPS_FETCHED)


class _Constants(NamedTuple):
    """Holds the constants of all steps, arguments of `blocked_steps`."""

    slope: Callable[[Array, Any], Array]
    mean: Array
    weight: Array
    ridge: Array
    step_size: Array
    active: Array
    bias: bool

    def slope_change(self, new, old):
        """Computes the change of slope, zero unless active."""
        # XLA fuses a difference into each of its uses, but materialises a quotient. Divided by a 1 that XLA cannot see
        # is one, the change is computed once, so that the arrays read for it alone are updated in place.
        one = jnp.where(self.active, jnp.ones_like(self.step_size), 2)
        return jnp.where(self.active, new - old, 0) / one


def _fold(block, carry, xs, size):
    """Folds a block, a function of a carry and of size rows of xs, over all chunks of that size and the remainder."""
    chunks, remainder = divmod(jax.tree.leaves(xs)[0].shape[0], size)

    def slice_chunk(first, size):
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size), xs)

    if chunks:
        carry = jax.lax.fori_loop(0, chunks, lambda i, carry: block(carry, *slice_chunk(i * size, size)), carry)
    return block(carry, *slice_chunk(chunks * size, remainder)) if remainder else carry


def _take(samples, index):
    return jax.tree.map(lambda leaf: leaf[index], samples)


def _sparse_block(start, samples, index, scale, constants):
    """Computes steps one after the other, as a margin takes only a few products."""
    rows, labels = samples
    steps, step_size = index.size, constants.step_size
    x = jnp.zeros((steps, rows.num_columns + constants.bias), rows.values.dtype)
    x = x.at[jnp.arange(steps)[:, None], rows.indices].add(rows.values)
    if constants.bias:
        x = x.at[:, -1].set(1)
    shrinkage, offset = 1 - step_size * constants.ridge, -step_size * constants.mean

    def step(t, carry):
        w, sum_change, entries = carry
        margins = jnp.sum(w[:, rows.indices[t]] * rows.values[t][None], axis=1)
        if constants.bias:
            margins = margins + w[:, -1]
        old, label = jax.tree.map(lambda leaf: leaf[t], (entries, labels))
        change = constants.slope_change(constants.slope(margins.reshape(old.shape), label), old)
        difference = change.reshape(-1, 1) * x[t][None]
        sum_change = sum_change + difference
        # Reads the new sum_change and corrects for the difference, because the old one would have to be copied.
        w = (
            shrinkage * w
            + offset
            - (step_size * constants.weight) * sum_change
            + (step_size * (constants.weight - scale[t])) * difference
        )
        # A sample that is drawn again in this block must find its new entry.
        same_sample = append_axes(index == index[t], entries)
        return w, sum_change, entries + jnp.where(same_sample, jnp.expand_dims(change, 0), 0)

    w, sum_change, entries = jax.lax.fori_loop(0, steps, step, (start.w, start.sum_change, start.table[index]))
    return Iterate(w, sum_change, start.table.at[index].set(entries))


def _wide_block(start, samples, index, scale, constants):
    """Computes steps one by one in the columns in which samples have entries, and in closed form in the others."""
    rows, labels = samples
    columns = rows.indices.ravel()
    if constants.bias:
        columns = jnp.append(columns, rows.num_columns)
    # A column that occurs several times gets one of its positions, no matter which.
    position = jnp.zeros(start.w.shape[1], jnp.int32).at[columns].set(jnp.arange(columns.size, dtype=jnp.int32))
    position = position[columns]
    narrow_rows = SparseRows(position[: rows.indices.size].reshape(rows.indices.shape), rows.values, rows.indices.size)
    narrow_start = Iterate(start.w[:, columns], start.sum_change[:, columns], start.table)
    narrow_end = _sparse_block(
        narrow_start, (narrow_rows, labels), index, scale, constants._replace(mean=constants.mean[:, columns])
    )
    decay, accumulated = _factors(index.size, constants).end
    w = decay * start.w - accumulated * (constants.mean + constants.weight * start.sum_change)
    w, sum_change = (
        leaf.at[:, columns].set(narrow_leaf[:, position])
        for leaf, narrow_leaf in ((w, narrow_end.w), (start.sum_change, narrow_end.sum_change))
    )
    return Iterate(w, sum_change, narrow_end.table)


class _Factors(NamedTuple):
    r"""Holds the factors of a block, which depend only on its number of steps, with :math:`\rho = 1 - \gamma \lambda`.

    Attributes:
        decay: The factor of the block's first w in w before step t, :math:`\rho^t`.
        accumulated: The factor, in w before step t, of the part of the estimate that is constant:
            :math:`\gamma \sum_{i < t} \rho^i`.
        direct: The factor, in w before step t, of q times the change of slope in step s: :math:`\gamma \rho^{t-1-s}`.
        indirect: The factor of the same change's effect through D: :math:`\gamma \theta \sum_{i < t-1-s} \rho^i`.
        last: direct and indirect after the last step.
        end: decay and accumulated after the last step.
    """

    decay: Array
    accumulated: Array
    direct: Array
    indirect: Array
    last: tuple[Array, Array]
    end: tuple[Array, Array]


def _factors(steps, constants):
    step_size, dtype = constants.step_size, constants.mean.dtype
    decay = (1 - step_size * constants.ridge) ** jnp.arange(steps + 1, dtype=dtype)
    sums = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(decay)])
    number = jnp.arange(steps)
    steps_between = number[None] - 1 - number[:, None]
    # Factors by the number of steps since a change of slope.
    direct, indirect = step_size * decay, step_size * constants.weight * sums
    steps_after = steps - 1 - number
    return _Factors(
        decay[:steps],
        step_size * sums[:steps],
        jnp.where(steps_between >= 0, direct[steps_between], 0),
        jnp.where(steps_between >= 0, indirect[steps_between], 0),
        (direct[steps_after], indirect[steps_after]),
        (decay[steps], step_size * sums[steps]),
    )


def _dense_block(start, samples, index, scale, constants):
    """Computes steps whose margins follow from two products of matrices."""
    x, labels = samples
    steps = index.size
    factors = _factors(steps, constants)
    if constants.bias:
        x = jnp.concatenate([x, jnp.ones((steps, 1), x.dtype)], axis=1)
    constant, entries = constants.mean + constants.weight * start.sum_change, start.table[index]
    products = jnp.split(jnp.concatenate([start.w, constant]) @ x.T, 2)
    w_margins, constant_margins = (part.T.reshape(entries.shape) for part in products)
    margins = _scale_rows(factors.decay, w_margins) - _scale_rows(factors.accumulated, constant_margins)
    # What a step's change of slope adds: to the margins of later steps, to the entries of all steps with the same
    # sample, and to the record of changes.
    effect = jnp.stack(
        [
            -(scale[:, None] * factors.direct + factors.indirect) * (x @ x.T),
            (index[:, None] == index[None]).astype(x.dtype),
            jnp.eye(steps, dtype=x.dtype),
        ],
        axis=1,
    )

    def step(t, carry):
        margins, entries, _ = carry
        label = jax.tree.map(lambda leaf: leaf[t], labels)
        change = constants.slope_change(constants.slope(margins[t], label), entries[t])
        return carry + jnp.multiply.outer(effect[t], change)

    carry = jnp.stack([margins, entries, jnp.zeros_like(entries)])
    _, entries, change = jax.lax.fori_loop(0, steps, step, carry)
    change = change.reshape(steps, -1)
    direct, indirect = factors.last
    coefficients = jnp.concatenate([_scale_rows(scale * direct + indirect, change), change], axis=1)
    w_change, sum_change = jnp.split(coefficients.T @ x, 2)
    decay, accumulated = factors.end
    return Iterate(
        decay * start.w - accumulated * constant - w_change,
        start.sum_change + sum_change,
        start.table.at[index].set(entries),
    )


def _scale_rows(factors, matrix):
    return append_axes(factors, matrix) * matrix
