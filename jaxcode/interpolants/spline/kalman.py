r"""The natural cubic smoothing spline as the smoothed state of an integrated Wiener process.

The minimiser of :math:`\sum_i w_i (g(t_i) - y_i)^2 + \mu \int g''^2` is the posterior mean of a process whose
:math:`g''` is white noise, observed with noise of variance :math:`\mu / w_i`, with a flat prior on its value and slope
(Wahba 1978). One Kalman filter runs over the sequence of knots and points from the left, one from the right, and at a
point their two estimates of (value, slope) are combined, each with its covariance (Fraser and Potter 1969).

A filter carries the covariance P of its estimate x as five numbers :math:`(p_{11}, p_{12}, p_{22}, \delta, q)` with
:math:`P = p / q` and :math:`\det P = \delta / q`, up to a common factor. So infinite variances, of which there are two
before the first site and one before the second, are represented by q = 0 without a limit. Both steps of the filter are
linear in the five numbers, and no coefficient is below zero. Over a gap h they become

.. math::
    p_{11} + 2 h p_{12} + h^2 p_{22} + \tfrac{h^3}{3} q, \quad p_{12} + h p_{22} + \tfrac{h^2}{2} q, \quad
    p_{22} + h q, \quad \delta + h p_{11} + h^2 p_{12} + \tfrac{h^3}{3} p_{22} + \tfrac{h^4}{12} q, \quad q,

and through an observation of weight w

.. math::
    \mu p_{11}, \quad \mu p_{12}, \quad w \delta + \mu p_{22}, \quad \mu \delta, \quad w p_{11} + \mu q.

The estimate is carried, with the same factor, as :math:`a = q x` for what is certain and as
:math:`b = (p_{22} x_1 - p_{12} x_2, \; p_{12} x_1 - p_{11} x_2)` for what is not: two sites close together determine a
slope that is large and uncertain, on which b does not depend. Over a gap

.. math::
    a_1 + h a_2, \quad a_2, \quad b_1 + h a_1 + \tfrac{h^2}{2} a_2, \quad
    b_2 + h b_1 + \tfrac{h^2}{2} a_1 + \tfrac{h^3}{6} a_2,

and through an observation y

.. math::
    \mu a_1 + w p_{11} y, \quad \mu a_2 + w (p_{12} y - b_2), \quad \mu b_1 + w \delta y, \quad \mu b_2.

With primes for the filter from the right, in whose time slopes have the other sign, the curve's value and its posterior
variance, in units of the process, are

.. math::
    g = \frac{\delta a_1' + p_{11} b_1' + p_{12} b_2' + \delta' a_1 + p_{11}' b_1 + p_{12}' b_2}{D}, \quad
    v = \frac{\delta p_{11}' + \delta' p_{11}}{D}, \quad
    D = \delta q' + \delta' q + p_{11} p_{22}' + p_{22} p_{11}' + 2 p_{12} p_{12}'.

Sums of positive terms lose no digits, however close the knots and whatever the smoothing, zero included: where the
usual equations for the second derivatives (Reinsch 1967), whose condition number is that of a fourth difference, are
wrong in every digit, these hold ten and more (`tests/benchmarks/accuracy.py`).

References:
    Wahba, Journal of the Royal Statistical Society B 40 (1978). Fraser and Potter, IEEE Transactions on Automatic
    Control 14 (1969). Green and Silverman, Nonparametric Regression and Generalized Linear Models (1994), chapter 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .interleaving import Interleaving


class Transitions(NamedTuple):
    """Holds the transitions of both filters over the gaps; the last axis is the filter: from the left, from the right.

    Attributes:
        covariance: Matrices that take (p11, p12, p22, delta, q) over the gap before each entry.
        next_gap: The gap after each entry.
    """

    covariance: Float[Array | np.ndarray, "entries 5 5 2"]
    next_gap: Float[Array | np.ndarray, "entries 2"]


class Gain(NamedTuple):
    """Holds the gain of both filters at an observation y: `smoothing` multiplies p and a, `weight` multiplies y.

    These are the smoothing and the weight, divided by the factor that makes q = 1.
    """

    smoothing: Float[Array, "entries 2"]
    weight: Float[Array, "entries 2"]


class Blocks(NamedTuple):
    """Holds the matrices from data to the curve's values at points, for each block of the sequence.

    A filter's state at the edge of a block is its estimate there from all data beyond the edge, as (a, b). The left
    state has a fifth number: for a site that is open at the edge, with knots on both sides, the weighted sum of its
    data so far.

    Attributes:
        forward: From the block's data and the left state before it, to the left state after it.
        backward: From the block's data, the right state after it and the left state before it, to the values at the
            block's points and the right state before it.
    """

    forward: Float[Array, "blocks 5 rows+5"]
    backward: Float[Array, "blocks points+4 rows+9"]


def find_transitions(
    interleaving: Interleaving,
    knots: Float[Array | np.ndarray, "knots"],
    points: Float[Array | np.ndarray, "points"],
    unit: Float[Array | np.ndarray, ""],
) -> Transitions:
    """Forms the transitions over the gaps between entries of the sequence.

    Args:
        interleaving: How knots and points interleave.
        knots: Ascending, float64.
        points: Ascending, float64.
        unit: The unit of length of the gaps.

    Returns:
        The transitions; NumPy arrays for NumPy arrays.
    """
    xp = np if isinstance(knots, np.ndarray) and isinstance(points, np.ndarray) else jnp
    gaps = xp.diff(xp.concatenate([points, knots])[interleaving.order]) / unit
    next_gap = xp.concatenate([gaps, xp.zeros(interleaving.length - gaps.shape[0])])
    last_gap = xp.concatenate([xp.zeros(1), next_gap[:-1]])
    h = xp.stack([last_gap, next_gap[::-1]], axis=1)
    zero, one = xp.zeros_like(h), xp.ones_like(h)
    covariance = [
        [one, 2 * h, h**2, zero, h**3 / 3],
        [zero, one, h, zero, h**2 / 2],
        [zero, zero, one, zero, h],
        [h, h**2, h**3 / 3, one, h**4 / 12],
        [zero, zero, zero, zero, one],
    ]
    return Transitions(
        xp.stack([xp.stack(row, 1) for row in covariance], 1), xp.stack([next_gap, last_gap[::-1]], axis=1)
    )


def form_matrix(
    interleaving: Interleaving, transitions: Transitions, weights: Float[Array, "knots"], smoothing: Float[Array, ""]
) -> Float[Array, "points knots"]:
    r"""Forms the matrix from data at the knots to the smoothing spline's values at the points.

    Args:
        interleaving: How knots and points interleave, in one block.
        transitions: From `find_transitions`, float64.
        weights: Not negative, float64; zero leaves the knot out.
        smoothing: :math:`\mu \ge 0`.

    Returns:
        The matrix. Finite, even with one weight above zero or none.
    """
    coefficients, _, share = _run_filters(interleaving, transitions, weights, smoothing)
    coefficients = coefficients[:, 0, 0, : interleaving.points] + coefficients[::-1, 1, 0, : interleaving.points]
    entry, closing = _knot_entries(interleaving)
    return (coefficients[entry[closing]] * share[:, None]).T


def form_blocks(
    interleaving: Interleaving, transitions: Transitions, weights: Float[Array, "knots"], smoothing: Float[Array, ""]
) -> Blocks:
    """Forms the matrix of `form_matrix` in blocks, from the same arguments and any number of blocks."""
    return _assemble_blocks(interleaving, *_run_filters(interleaving, transitions, weights, smoothing))


def _run_filters(interleaving, transitions, weights, smoothing):
    """Runs both filters and their adjoint; returns the results of `_run_adjoint`, and each knot's share of its site."""
    observed, share = _sum_weights(interleaving, weights)
    covariance = _predict_covariances(transitions.covariance, observed, smoothing)
    gain = _compute_gain(covariance, observed, smoothing)
    evaluations = _compute_evaluations(interleaving, covariance)
    return *_run_adjoint(interleaving, gain, transitions.next_gap, covariance, evaluations), share


def _sum_weights(interleaving, weights):
    """Returns the weight observed at each entry, shape (entries, 2), and each knot's share of its site."""
    n = weights.shape[0]
    if interleaving.distinct:
        total, share = weights, jnp.ones_like(weights)
    else:
        site_weight = jnp.zeros_like(weights).at[interleaving.closing].add(weights)
        share = weights / jnp.where(site_weight > 0, site_weight, 1)[interleaving.closing]
        total = jnp.where(interleaving.closing == jnp.arange(n, dtype=jnp.int32), site_weight, 0)
    observed = jnp.concatenate([jnp.zeros(interleaving.num_points, weights.dtype), total])[interleaving.order]
    return _stack_filters(interleaving, observed, 0), share


def _predict_covariances(
    transition: Float[Array | np.ndarray, "entries 5 5 2"],
    weight: Float[Array, "entries 2"],
    smoothing: Float[Array, ""],
) -> tuple[Float[Array, "entries 2"], ...]:
    """Computes both filters' predicted covariances (p11, p12, p22, delta, q), those before each entry's observation."""

    def step(p, entry):
        transition, w = entry
        p = jnp.sum(transition * p, axis=1)
        p11, _, _, det, _ = p
        gain = _compute_gain(p, w, smoothing)
        zero = jnp.zeros_like(w)
        return gain.smoothing * p + jnp.stack([zero, zero, gain.weight * det, zero, gain.weight * p11]), p

    # Neither value nor slope is known before the first site.
    start = jnp.zeros((5, 2), weight.dtype).at[3].set(1)
    predicted = jax.lax.scan(step, start, (transition, weight))[1]
    return tuple(jnp.moveaxis(predicted, 1, 0))


def _compute_gain(covariance, weight, smoothing) -> Gain:
    """Divides smoothing and weight by a factor such that q becomes 1.

    Before the second site, where q remains 0, the factor makes the slope's variance 1. Without an observation nothing
    changes.
    """
    p11, _, p22, det, q = covariance
    new_q = weight * p11 + smoothing * q
    factor = jnp.where(new_q > 0, new_q, weight * det + smoothing * p22)
    inverse = 1 / jnp.where(weight > 0, factor, 1)
    return Gain(jnp.where(weight > 0, smoothing * inverse, 1), weight * inverse)


def _compute_evaluations(interleaving, covariance):
    """Returns each filter's coefficients of a_1, b_1 and b_2 in the value g at every point; zero at other entries."""
    p11, p12, p22, det, q = covariance
    # The covariance of the other filter at the same entry.
    other_p11, other_p12, other_p22, other_det, other_q = (part[::-1, ::-1] for part in covariance)
    total = det * other_q + other_det * q + p11 * other_p22 + p22 * other_p11 + 2 * p12 * other_p12
    is_point = _stack_filters(interleaving, interleaving.order < interleaving.num_points, False)
    is_determined = total > 0
    inverse = jnp.where(is_point & is_determined, 1 / jnp.where(is_determined, total, 1), 0)
    # With a single site the curve is its value, which is in b_1 of the filter whose data include it.
    has_single_site = is_point & ~is_determined & (p22 > 0)
    single_evaluation = jnp.where(has_single_site, 1 / jnp.where(p22 > 0, p22, 1), 0)
    return other_det * inverse, other_p11 * inverse + single_evaluation, other_p12 * inverse


def _stack_filters(interleaving, values, padding):
    """Pads values of the sequence's entries to whole blocks and stacks them in the order of either filter."""
    padding_values = jnp.full(interleaving.length - interleaving.order.shape[0], padding, values.dtype)
    values = jnp.concatenate([values, padding_values])
    return jnp.stack([values, values[::-1]], axis=1)


def _run_adjoint(interleaving, gain, next_gap, covariance, evaluations):
    """Runs the adjoint of both filters from every point back over the data, which gives the rows of their matrices.

    Rows are the block's points, followed by the four numbers of the state with which the filter leaves the block.

    Returns:
        The coefficients of each entry's data, shape (steps, 2, blocks, rows), and those of the state with which the
        filter enters the block, shape (2, blocks, rows, 4).
    """
    blocks = interleaving.length // interleaving.block_size

    def reshape_to_steps(values):
        """Reshapes (entries, 2) to (steps, 2, blocks), blocks in the sequence's order for both filters."""
        blocks_of_values = jnp.reshape(values, (blocks, interleaving.block_size, 2))
        return jnp.stack([blocks_of_values[:, :, 0].T, blocks_of_values[::-1, :, 1].T], axis=1)

    first_point = jnp.repeat(jnp.asarray(interleaving.first_point), interleaving.block_size)
    first_point = first_point[: interleaving.order.shape[0]]
    row_of_point = jnp.where(interleaving.order < interleaving.num_points, interleaving.order - first_point, -1)
    row_of_point = _stack_filters(interleaving, row_of_point, -1)
    row = jnp.arange(interleaving.points + 4, dtype=jnp.int32)

    def step(state, entry):
        entry = jax.tree.map(lambda leaf: leaf[..., None], entry)
        (smoothing, weight), h, (p11, p12, _, det, _), evaluation, row_of_point = entry
        evaluation_a1, evaluation_b1, evaluation_b2 = evaluation
        # The derivatives of every row by the filter's a_1, a_2, b_1 and b_2 after the gap that follows this entry.
        adjoint_a1, adjoint_a2, adjoint_b1, adjoint_b2 = state
        h2, h3 = h**2 / 2, h**3 / 6
        # The transposed transition, then the transposed observation.
        adjoint_a1, adjoint_a2, adjoint_b1 = (
            adjoint_a1 + h * adjoint_b1 + h2 * adjoint_b2,
            adjoint_a2 + h * adjoint_a1 + h2 * adjoint_b1 + h3 * adjoint_b2,
            adjoint_b1 + h * adjoint_b2,
        )
        data_coefficients = weight * (p11 * adjoint_a1 + p12 * adjoint_a2 + det * adjoint_b1)
        is_evaluated = row == row_of_point
        previous = (
            smoothing * adjoint_a1 + jnp.where(is_evaluated, evaluation_a1, 0),
            smoothing * adjoint_a2,
            smoothing * adjoint_b1 + jnp.where(is_evaluated, evaluation_b1, 0),
            smoothing * adjoint_b2 - weight * adjoint_a2 + jnp.where(is_evaluated, evaluation_b2, 0),
        )
        return previous, data_coefficients

    final_rows = np.eye(4, interleaving.points + 4, interleaving.points)
    shape = 2, blocks, row.shape[0]
    final = tuple(jnp.broadcast_to(jnp.asarray(part, evaluations[0].dtype), shape) for part in final_rows)
    entries = jax.tree.map(reshape_to_steps, (tuple(gain), next_gap, covariance, evaluations, row_of_point))
    state, data_coefficients = jax.lax.scan(step, final, entries, reverse=True)
    return data_coefficients, jnp.stack(state, axis=-1)


def _assemble_blocks(interleaving, data_coefficients, state_coefficients, share):
    """Assembles each block's matrices from columns for its data, for both states and for the sum of an open site."""
    data, carried_share = _form_data_columns(interleaving, data_coefficients, share)
    open_sum, is_carried = _form_open_sum_columns(interleaving, data_coefficients)
    left_filter, right_filter = 0, 1
    point_rows, state_rows = slice(None, interleaving.points), slice(interleaving.points, None)
    zeros = jnp.zeros((is_carried.shape[0], 1, 4), share.dtype)

    def join(*columns):
        return jnp.concatenate(columns, axis=-1)

    # Named by what the rows are; the columns are the data, the states and the sum.
    left_state = join(
        data[left_filter, :, state_rows],
        state_coefficients[left_filter, :, state_rows],
        open_sum[left_filter, :, state_rows],
    )
    next_open_sum = join(carried_share[:, None], zeros, is_carried[:, None, None])
    values = join(data.sum(0)[:, point_rows], *state_coefficients[::-1, :, point_rows], open_sum.sum(0)[:, point_rows])
    # The filter from the right does not depend on the left state, but for the sum of an open site.
    right_state = join(
        data[right_filter, :, state_rows],
        state_coefficients[right_filter, :, state_rows],
        jnp.broadcast_to(zeros, (zeros.shape[0], 4, 4)),
        open_sum[right_filter, :, state_rows],
    )
    return Blocks(
        forward=jnp.concatenate([left_state, next_open_sum], axis=1),
        backward=jnp.concatenate([values, right_state], axis=1),
    )


def _form_data_columns(interleaving, data_coefficients, share):
    """Forms the columns for each block's data.

    Data are summed over their site, which is observed where it closes: in the same block or a later one.

    Returns:
        Both filters' columns, shape (2, blocks, points + 4, rows), zero for data of sites that close in a later block;
        and the shares with which the latter enter the sum of the open site, shape (blocks, rows).
    """
    entry, closing = _knot_entries(interleaving)
    block = _block_indices(interleaving)[:, None]
    row = jnp.asarray(interleaving.first_row)[:, None] + jnp.arange(interleaving.rows, dtype=jnp.int32)
    is_in_block = entry[row] // interleaving.block_size == block
    closing_entry = entry[closing[row]]
    closes_in_block = is_in_block & (closing_entry // interleaving.block_size == block)
    columns = _gather(interleaving, data_coefficients, closing_entry, closes_in_block) * share[row][..., None]
    return jnp.swapaxes(columns, -1, -2), jnp.where(is_in_block & ~closes_in_block, share[row], 0)


def _form_open_sum_columns(interleaving, data_coefficients):
    """Forms the column for the sum that earlier blocks carry of an open site, observed in the block where it closes.

    Returns:
        Both filters' columns, shape (2, blocks, points + 4, 1); and 1 for blocks where the site stays open, else 0.
    """
    entry, closing = _knot_entries(interleaving)
    knots_before, n = jnp.asarray(interleaving.knots_before), closing.shape[0]
    next_knot, last_knot = jnp.minimum(knots_before, n - 1), jnp.maximum(knots_before - 1, 0)
    is_open = (knots_before > 0) & (knots_before < n) & (closing[next_knot] == closing[last_knot])
    closing_entry = entry[closing[next_knot]]
    closes_in_block = closing_entry // interleaving.block_size == _block_indices(interleaving)
    columns = _gather(interleaving, data_coefficients, closing_entry, is_open & closes_in_block)[..., None]
    return columns, jnp.where(is_open & ~closes_in_block, 1, 0).astype(columns.dtype)


def _gather(interleaving, data_coefficients, entry, is_selected):
    """Gathers both filters' coefficients of entries' data, from (blocks, ...) to (2, blocks, ..., points + 4)."""
    block = jnp.expand_dims(_block_indices(interleaving), tuple(range(1, entry.ndim)))
    block = jnp.broadcast_to(block, entry.shape)
    step = jnp.where(is_selected, entry - block * interleaving.block_size, 0)
    # The filter from the right takes a block's entries in reverse order.
    reverse_step = interleaving.block_size - 1 - step
    both = jnp.stack([data_coefficients[step, 0, block], data_coefficients[reverse_step, 1, block]])
    return jnp.where(is_selected[..., None], both, 0)


def _knot_entries(interleaving):
    """Returns each knot's entry, and the last knot of its site."""
    return jnp.asarray(interleaving.entry)[interleaving.num_points :], jnp.asarray(interleaving.closing)


def _block_indices(interleaving):
    return jnp.arange(interleaving.knots_before.shape[0], dtype=jnp.int32)
