r"""The natural cubic smoothing spline as the smoothed state of an integrated Wiener process.

The minimiser of :math:`\sum_i w_i (g(t_i) - y_i)^2 + \mu \int g''^2` is the posterior mean of a process with
:math:`g'' =` white noise, seen through noise of variance :math:`\mu / w_i`, when nothing is known of its value and
slope beforehand (Wahba 1978). One Kalman filter runs over the sequence of knots and points from the left, one from the
right, and where they meet at a point their estimates of (value, slope) are weighed against each other (Fraser and
Potter 1969).

A filter carries the covariance P of its estimate x as :math:`(p_{11}, p_{12}, p_{22}, \delta, q)` with
:math:`P = p / q` and :math:`\det P = \delta / q`, up to a common factor: so infinite variances, of which there are two
before the first site and one before the second, are q = 0 instead of a limit. Both steps of the filter are linear in
them, and no coefficient is below zero. Over a gap h

.. math::
    p_{11} + 2 h p_{12} + h^2 p_{22} + \tfrac{h^3}{3} q, \quad p_{12} + h p_{22} + \tfrac{h^2}{2} q, \quad
    p_{22} + h q, \quad \delta + h p_{11} + h^2 p_{12} + \tfrac{h^3}{3} p_{22} + \tfrac{h^4}{12} q, \quad q,

and through an observation of weight w

.. math::
    \mu p_{11}, \quad \mu p_{12}, \quad w \delta + \mu p_{22}, \quad \mu \delta, \quad w p_{11} + \mu q.

The estimate is carried, with the same factor, as :math:`a = q x` for what is certain and as
:math:`b = (p_{22} x_1 - p_{12} x_2, \; p_{12} x_1 - p_{11} x_2)` for what is not: two sites close together leave a
slope that is large and means nothing, and in b it has no part. Over a gap

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

Sums of positive terms lose nothing, however close the knots and whatever the smoothing, zero included: where the usual
equations for the second derivatives (Reinsch 1967), whose condition number is that of a fourth difference, are wrong in
every digit, these hold ten and more (`tests/benchmarks/accuracy.py`).

References:
    Wahba, Journal of the Royal Statistical Society B 40 (1978). Fraser and Potter, IEEE Transactions on Automatic
    Control 14 (1969). Green and Silverman, Nonparametric Regression and Generalized Linear Models (1994), chapter 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .sequence import Sequence


class Moves(NamedTuple):
    """What crossing the gaps does to the filters; the last axis tells the one that runs against the sequence apart.

    Attributes:
        arriving: What the gap before each entry does to the covariance.
        ahead: The gap after each entry.
    """

    arriving: Float[Array | np.ndarray, "entries 5 5 2"]
    ahead: Float[Array | np.ndarray, "entries 2"]


class Blocks(NamedTuple):
    """What takes data to the curve's values at points, block by block of the sequence.

    A filter's state at the edge of a block is its estimate there from all data beyond the edge, as (a, b). To the
    left's belongs a fifth number: the sum, so far, of a site whose first knots stand before the edge and others after.

    Attributes:
        forward: The block's data and the left state before it, to the left state after it.
        backward: The block's data, the right state after it and the left state before it, to the values at the block's
            points and the right state before it.
    """

    forward: Float[Array, "blocks 5 rows+5"]
    backward: Float[Array, "blocks points+4 rows+9"]


def find_moves(
    sequence: Sequence, knots: Float[Array | np.ndarray, "knots"], points: Float[Array | np.ndarray, "points"]
) -> Moves:
    """What the gaps between knots and points, both ascending and in float64, do to the filters."""
    xp = np if isinstance(knots, np.ndarray) and isinstance(points, np.ndarray) else jnp
    gaps = xp.diff(xp.concatenate([points, knots])[sequence.order])
    gaps = xp.concatenate([gaps, xp.zeros(sequence.length - gaps.shape[0])])
    before = xp.concatenate([xp.zeros(1), gaps[:-1]])
    h = xp.stack([before, gaps[::-1]], axis=1)
    zero, one = xp.zeros_like(h), xp.ones_like(h)
    arriving = [
        [one, 2 * h, h**2, zero, h**3 / 3],
        [zero, one, h, zero, h**2 / 2],
        [zero, zero, one, zero, h],
        [h, h**2, h**3 / 3, one, h**4 / 12],
        [zero, zero, zero, zero, one],
    ]
    return Moves(xp.stack([xp.stack(row, 1) for row in arriving], 1), xp.stack([gaps, before[::-1]], axis=1))


def matrix_by_filters(
    sequence: Sequence, moves: Moves, weights: Float[Array, "knots"], smoothing: Float[Array, ""]
) -> Float[Array, "points knots"]:
    r"""The matrix from any data at the knots to the smoothing spline's values at the points.

    Args:
        sequence: How knots and points interleave, in one block.
        moves: What `find_moves` says of the gaps, float64.
        weights: Not negative, float64; zero leaves the knot out.
        smoothing: :math:`\mu \ge 0`.

    Returns:
        The matrix. Finite, even with one weight above zero or none.
    """
    of_data, _, share = _filter(sequence, moves, weights, smoothing)
    at = jnp.asarray(sequence.entry)[sequence.num_points + jnp.asarray(sequence.closing)]
    both = of_data[:, 0, 0, : sequence.points] + of_data[::-1, 1, 0, : sequence.points]
    return (both[at] * share[:, None]).T


def blocks_by_filters(
    sequence: Sequence, moves: Moves, weights: Float[Array, "knots"], smoothing: Float[Array, ""]
) -> Blocks:
    """The same block by block of the sequence. Arguments as for `matrix_by_filters`, with any number of blocks."""
    return _in_blocks(sequence, *_filter(sequence, moves, weights, smoothing))


def _filter(sequence, moves, weights, smoothing):
    """What `_pull` returns, and each knot's share of its site."""
    entered, share = _enter(sequence, weights)
    predicted = _covariances(moves.arriving, entered, smoothing)
    remains, seen = _observe(predicted, entered, smoothing)
    pulled = _pull(sequence, (remains, seen, moves.ahead, *predicted), _weigh(sequence, predicted))
    return *pulled, share


def _enter(sequence, weights):
    """The weight that each filter meets at each entry, shape (entries, 2); and each knot's share of its site."""
    n = weights.shape[0]
    if sequence.distinct:
        total, share = weights, jnp.ones_like(weights)
    else:
        of_site = jnp.zeros_like(weights).at[sequence.closing].add(weights)
        share = weights / jnp.where(of_site > 0, of_site, 1)[sequence.closing]
        total = jnp.where(sequence.closing == jnp.arange(n, dtype=jnp.int32), of_site, 0)
    entered = jnp.concatenate([jnp.zeros(sequence.num_points, weights.dtype), total])[sequence.order]
    return _per_entry(sequence, entered, 0), share


def _covariances(
    arriving: Float[Array | np.ndarray, "entries 5 5 2"], weight: Float[Array, "entries 2"], smoothing: Float[Array, ""]
) -> tuple[Float[Array, "entries 2"], ...]:
    """Each filter's p11, p12, p22, delta and q at every entry, before what is observed there."""

    def step(p, entry):
        arriving, w = entry
        p = jnp.sum(arriving * p, axis=1)
        p11, _, _, det, _ = p
        remains, seen = _observe(p, w, smoothing)
        zero = jnp.zeros_like(seen)
        return remains * p + jnp.stack([zero, zero, seen * det, zero, seen * p11]), p

    unknown = jnp.zeros((5, 2), weight.dtype).at[3].set(1)
    predicted = jax.lax.scan(step, unknown, (arriving, weight))[1]
    return tuple(jnp.moveaxis(predicted, 1, 0))


def _observe(covariance, weight, smoothing):
    """What the smoothing and the weight are at every entry, once all is divided so that q becomes 1.

    Before the second site, where q remains 0, the slope's variance becomes 1; where nothing is observed, all remains.
    """
    p11, _, p22, det, q = covariance
    certain = weight * p11 + smoothing * q
    unit = jnp.where(certain > 0, certain, weight * det + smoothing * p22)
    over = 1 / jnp.where(weight > 0, unit, 1)
    return jnp.where(weight > 0, smoothing * over, 1), weight * over


def _weigh(sequence, predicted):
    """What a_1, b_1 and b_2 of each filter are multiplied by at every point; zero at other entries."""
    p11, p12, p22, det, q = predicted
    # At the same entry, of the filter from the other side.
    r11, r12, r22, other_det, other_q = (v[::-1, ::-1] for v in predicted)
    total = det * other_q + other_det * q + p11 * r22 + p22 * r11 + 2 * p12 * r12
    is_point = _per_entry(sequence, sequence.order < sequence.num_points, False)
    met = total > 0
    over = jnp.where(is_point & met, 1 / jnp.where(met, total, 1), 0)
    # Without a second site anywhere, the value at the only one.
    alone = is_point & ~met & (p22 > 0)
    only = jnp.where(alone, 1 / jnp.where(p22 > 0, p22, 1), 0)
    return other_det * over, r11 * over + only, r12 * over


def _per_entry(sequence, values, filler):
    """What is known of the sequence's entries for either filter, and for those that fill the last block up."""
    filled = jnp.full(sequence.length - sequence.order.shape[0], filler, values.dtype)
    values = jnp.concatenate([values, filled])
    return jnp.stack([values, values[::-1]], axis=1)


def _pull(sequence, entries, weighs):
    """Runs both filters backwards from every point to the data: the rows of their matrices.

    Rows are the block's points, and after them the four parts of the state that the filter leaves the block with.

    Returns:
        What each entry's data are multiplied by, shape (steps, 2, blocks, rows), and what the state that the filter
        enters the block with is, shape (2, blocks, rows, 4).
    """
    blocks = sequence.length // sequence.block

    def per_block(of_entries):
        """(entries, 2) to (steps, 2, blocks), blocks in the sequence's order for both filters."""
        by_block = jnp.reshape(of_entries, (blocks, sequence.block, 2))
        return jnp.stack([by_block[:, :, 0].T, by_block[::-1, :, 1].T], axis=1)

    first = jnp.repeat(jnp.asarray(sequence.first_point), sequence.block)[: sequence.order.shape[0]]
    column = jnp.where(sequence.order < sequence.num_points, sequence.order - first, -1)
    column = _per_entry(sequence, column, -1)
    row = jnp.arange(sequence.points + 4, dtype=jnp.int32)

    def step(state, entry):
        (remains, seen, h, p11, p12, _, det, _), (weigh_a1, weigh_b1, weigh_b2), column = jax.tree.map(
            lambda v: v[..., None], entry
        )
        a1, a2, b1, b2 = state
        h2, h3 = h**2 / 2, h**3 / 6
        a1, a2, b1 = a1 + h * b1 + h2 * b2, a2 + h * a1 + h2 * b1 + h3 * b2, b1 + h * b2
        of_data = seen * (p11 * a1 + p12 * a2 + det * b1)
        here = row == column
        before = (
            remains * a1 + jnp.where(here, weigh_a1, 0),
            remains * a2,
            remains * b1 + jnp.where(here, weigh_b1, 0),
            remains * b2 - seen * a2 + jnp.where(here, weigh_b2, 0),
        )
        return before, of_data

    leaves = np.eye(4, sequence.points + 4, sequence.points)
    start = tuple(jnp.broadcast_to(jnp.asarray(v, weighs[0].dtype), (2, blocks, row.shape[0])) for v in leaves)
    along = jax.tree.map(per_block, (entries, weighs, column))
    state, of_data = jax.lax.scan(step, start, along, reverse=True)
    return of_data, jnp.stack(state, axis=-1)


def _in_blocks(sequence, of_data, of_state, share):
    """Puts together what belongs to each block, from what its entries' data are multiplied by."""
    steps, n, p = sequence.block, sequence.closing.shape[0], sequence.num_points
    entry, closing = jnp.asarray(sequence.entry)[p:], jnp.asarray(sequence.closing)
    before = jnp.asarray(sequence.knots_before)
    block = jnp.arange(before.shape[0], dtype=jnp.int32)

    def multipliers(at, where):
        """What both filters multiply the data of one entry of each block by, shape (2, blocks, ..., points + 4)."""
        in_block = jnp.broadcast_to(jnp.expand_dims(block, tuple(range(1, at.ndim))), at.shape)
        step = jnp.where(where, at - in_block * steps, 0)
        found = jnp.stack([of_data[step, 0, in_block], of_data[steps - 1 - step, 1, in_block]])
        return jnp.where(where[..., None], found, 0)

    # Data are added up over their site, and count where it closes: in their own block or a later one.
    row = jnp.asarray(sequence.first_row)[:, None] + jnp.arange(sequence.rows, dtype=jnp.int32)
    mine = entry[row] // steps == block[:, None]
    closes = entry[closing[row]]
    here = mine & (closes // steps == block[:, None])
    later = jnp.where(mine & ~here, share[row], 0)
    data = jnp.swapaxes(multipliers(closes, here) * share[row][..., None], -1, -2)

    # What earlier blocks have added up counts where that site closes, if it does so here.
    next_knot, last_knot = jnp.minimum(before, n - 1), jnp.maximum(before - 1, 0)
    is_open = (before > 0) & (before < n) & (closing[next_knot] == closing[last_knot])
    closes = entry[closing[next_knot]]
    now = closes // steps == block
    summed = multipliers(closes, is_open & now)[..., None]
    stays_open = jnp.where(is_open & ~now, 1, 0).astype(share.dtype)

    at_points, at_edge = slice(None, sequence.points), slice(sequence.points, None)
    left, right = 0, 1

    def join(*parts):
        return jnp.concatenate(parts, axis=-1)

    none = jnp.zeros((before.shape[0], 1, 4), share.dtype)
    return Blocks(
        forward=jnp.concatenate(
            [
                join(data[left, :, at_edge], of_state[left, :, at_edge], summed[left, :, at_edge]),
                join(later[:, None], none, stays_open[:, None, None]),
            ],
            axis=1,
        ),
        backward=jnp.concatenate(
            [
                join(data.sum(0)[:, at_points], *of_state[::-1, :, at_points], summed.sum(0)[:, at_points]),
                join(
                    data[right, :, at_edge],
                    of_state[right, :, at_edge],
                    jnp.broadcast_to(none, (before.shape[0], 4, 4)),
                    summed[right, :, at_edge],
                ),
            ],
            axis=1,
        ),
    )
