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
    """What crossing the gaps does to the filters: filter 0 runs as the sequence does, filter 1 against it.

    Attributes:
        arriving: Of the covariance, over the gap before each entry.
        leaving: Of the estimate, over the gap after each entry.
    """

    arriving: Float[Array | np.ndarray, "entries 2 5 5"]
    leaving: Float[Array | np.ndarray, "entries 2 4 4"]


class Blocks(NamedTuple):
    """What takes data to the curve's values at points, block by block of the sequence.

    A filter's state at the edge of a block is its estimate there from all data beyond the edge, as (a, b).

    Attributes:
        from_data: The block's data to its points.
        from_left: The left filter's state at the block's first entry to its points.
        from_right: The right filter's state at the block's last entry to its points.
        push_data: The block's data to the states that the two filters leave the block with.
        push_state: The state that each filter enters the block with to the one that it leaves with.
    """

    from_data: Float[Array, "blocks points rows"]
    from_left: Float[Array, "blocks points 4"]
    from_right: Float[Array, "blocks points 4"]
    push_data: Float[Array, "2 blocks 4 rows"]
    push_state: Float[Array, "2 blocks 4 4"]


def find_moves(
    sequence: Sequence, knots: Float[Array | np.ndarray, "knots"], points: Float[Array | np.ndarray, "points"]
) -> Moves:
    """What the gaps between knots and points, both ascending and in float64, do to the filters."""
    xp = np if isinstance(knots, np.ndarray) and isinstance(points, np.ndarray) else jnp
    gaps = xp.diff(xp.concatenate([points, knots])[sequence.order])
    gaps = xp.concatenate([gaps, xp.zeros(sequence.length - gaps.shape[0])])
    before = xp.concatenate([xp.zeros(1), gaps[:-1]])

    def table(h, rows):
        zero, one = xp.zeros_like(h), xp.ones_like(h)
        named = {0: zero, 1: one}
        return xp.stack([xp.stack([named.get(v, v) if isinstance(v, int) else v for v in row], -1) for row in rows], -2)

    h = xp.stack([before, gaps[::-1]], axis=1)
    arriving = [
        [1, 2 * h, h**2, 0, h**3 / 3],
        [0, 1, h, 0, h**2 / 2],
        [0, 0, 1, 0, h],
        [h, h**2, h**3 / 3, 1, h**4 / 12],
        [0, 0, 0, 0, 1],
    ]
    g = xp.stack([gaps, before[::-1]], axis=1)
    leaving = [[1, g, 0, 0], [0, 1, 0, 0], [g, g**2 / 2, 1, 0], [g**2 / 2, g**3 / 6, g, 1]]
    return Moves(table(h, arriving), table(g, leaving))


def two_filter(sequence: Sequence, moves: Moves, weights: Float[Array, "knots"], smoothing: Float[Array, ""]) -> Blocks:
    r"""Prepares a smoothing spline for any data at the knots and for its values at the points.

    Args:
        sequence: How knots and points interleave.
        moves: What `find_moves` says of the gaps, float64.
        weights: Not negative, float64; zero leaves the knot out.
        smoothing: :math:`\mu \ge 0`.

    Returns:
        The blocks. All finite, even with one weight above zero or none.
    """
    entered, share = _enter(sequence, weights)
    predicted = _covariances(moves.arriving, entered, smoothing)
    keep, take = _observe(moves.leaving, predicted, entered, smoothing)
    of_data, of_state = _pull(sequence, keep, take, _weigh(sequence, predicted))
    from_data = _to_rows(sequence, of_data, share)
    at_points, at_edge = slice(None, sequence.points), slice(sequence.points, None)
    return Blocks(
        from_data=from_data[0, :, at_points] + from_data[1, :, at_points],
        from_left=of_state[0, :, at_points],
        from_right=of_state[1, :, at_points],
        push_data=from_data[:, :, at_edge],
        push_state=of_state[:, :, at_edge],
    )


def _enter(sequence, weights):
    """The weight that each filter meets at each entry, shape (entries, 2); and each knot's share of its site."""
    n = weights.shape[0]
    if sequence.distinct:
        total, share = weights, jnp.ones_like(weights)
    else:
        of_site = jnp.zeros_like(weights).at[sequence.closing].add(weights)
        share = weights / jnp.where(of_site > 0, of_site, 1)[sequence.closing]
        total = jnp.where(sequence.closing == jnp.arange(n, dtype=jnp.int32), of_site, 0)
    p = sequence.order.shape[0] - n
    entered = jnp.concatenate([jnp.zeros(p, weights.dtype), total])[sequence.order]
    entered = jnp.concatenate([entered, jnp.zeros(sequence.length - n - p, weights.dtype)])
    return jnp.stack([entered, entered[::-1]], axis=1), share


def _covariances(
    arriving: Float[Array | np.ndarray, "entries 2 5 5"], weight: Float[Array, "entries 2"], smoothing: Float[Array, ""]
) -> Float[Array, "entries 2 5"]:
    """Each filter's (p11, p12, p22, delta, q) at every entry, before what is observed there."""
    # As rows: mu p11, mu p12, w delta + mu p22, mu delta, w p11 + mu q.
    observing = smoothing * np.eye(5) + weight[..., None, None] * _place((2, 3), (4, 0))

    def step(p, entry):
        arriving, observing, w = entry
        p = _times(arriving, p)
        unit = _unit(p, w, smoothing)
        return jnp.where(w[:, None] > 0, _times(observing, p) / unit[:, None], p), p

    unknown = jnp.broadcast_to(jnp.asarray([0.0, 0, 0, 1, 0], weight.dtype), (2, 5))
    return jax.lax.scan(step, unknown, (arriving, observing, weight))[1]


def _place(*places):
    """A 5 x 5 matrix of ones in these places."""
    matrix = np.zeros((5, 5))
    matrix[tuple(np.transpose(places))] = 1
    return matrix


def _times(matrix, vector):
    """Products of matrices and vectors, without the dot that would lose its float64 when batched with x64 off."""
    return jnp.sum(matrix * vector[..., None, :], axis=-1)


def _unit(covariance, weight, smoothing):
    """What an observation is divided by, so that q becomes 1; or before the second site, the slope's variance."""
    p11, p22, det, q = (covariance[..., i] for i in (0, 2, 3, 4))
    certain = weight * p11 + smoothing * q
    return jnp.where(weight > 0, jnp.where(certain > 0, certain, weight * det + smoothing * p22), 1)


def _observe(leaving, predicted, weight, smoothing):
    """What an entry does to an estimate on its way to the next one: to the estimate, and with the data there."""
    over = 1 / _unit(predicted, weight, smoothing)
    seen = weight * over
    remains = jnp.where(weight > 0, smoothing * over, 1)
    # From b_2 to a_2, and p11, p12 and delta times the data to a_1, a_2 and b_1.
    keep = remains[..., None, None] * np.eye(4) - seen[..., None, None] * _place((1, 3))[:4, :4]
    take = seen[..., None] * _times(_place((0, 0), (1, 1), (2, 3))[:4], predicted)
    return jnp.sum(leaving[..., None] * keep[..., None, :, :], axis=-2), _times(leaving, take)


def _weigh(sequence, predicted):
    """What (a, b) of each filter are multiplied by at every point; zero at other entries. Shape (entries, 2, 4)."""
    other = predicted[::-1, ::-1]
    total = jnp.sum(predicted * _times(_place((0, 2), (2, 0), (3, 4), (4, 3)) + 2 * _place((1, 1)), other), axis=-1)
    p = sequence.order.shape[0] - sequence.closing.shape[0]
    is_point = jnp.concatenate([sequence.order < p, jnp.zeros(sequence.length - sequence.order.shape[0], bool)])
    is_point = jnp.stack([is_point, is_point[::-1]], axis=1)
    met = total > 0
    over = jnp.where(is_point & met, 1 / jnp.where(met, total, 1), 0)
    # Without a second site anywhere, the value at the only one.
    slope = predicted[..., 2]
    alone = is_point & ~met & (slope > 0)
    only = jnp.where(alone, 1 / jnp.where(slope > 0, slope, 1), 0)
    both = _times(_place((0, 3), (2, 0), (3, 1))[:4], other)
    return over[..., None] * both + only[..., None] * np.array([0.0, 0, 1, 0])


def _pull(sequence, keep, take, weigh):
    """Runs both filters backwards from every point to the data: the rows of their matrices.

    Rows are the block's points, and after them the four parts of the state that the filter leaves the block with.

    Returns:
        What each entry's data are multiplied by, shape (steps, 2, blocks, rows), and what the state that the filter
        enters the block with is, shape (2, blocks, rows, 4).
    """
    blocks = sequence.length // sequence.block

    def per_block(of_entries):
        """(entries, 2, ...) to (steps, 2, blocks, ...), blocks in the sequence's order for both filters."""
        by_block = of_entries.reshape(blocks, sequence.block, *of_entries.shape[1:])
        both = jnp.stack([by_block[:, :, 0], by_block[::-1, :, 1]])
        return jnp.moveaxis(both, 2, 0)

    n = sequence.closing.shape[0]
    p = sequence.order.shape[0] - n
    point = jnp.concatenate([sequence.order, jnp.full(sequence.length - n - p, p, jnp.int32)])
    column = point - jnp.repeat(jnp.asarray(sequence.first_point), sequence.block)
    column = jnp.stack([column, column[::-1]], axis=1)
    row = jnp.arange(sequence.points + 4, dtype=jnp.int32)

    def step(state, entry):
        keep, take, weigh, column = entry
        of_data = _times(state, take)
        before = jnp.sum(state[..., None] * keep[:, :, None], axis=-2)
        return before + jnp.where(row == column[..., None], 1, 0)[..., None] * weigh[:, :, None], of_data

    leaves = jnp.asarray(np.eye(sequence.points + 4, 4, -sequence.points), keep.dtype)
    start = jnp.broadcast_to(leaves, (2, blocks, *leaves.shape))
    along = tuple(per_block(v) for v in (keep, take, weigh, column))
    state, of_data = jax.lax.scan(step, start, along, reverse=True)
    return of_data, state


def _to_rows(sequence, of_data, share):
    """What data are multiplied by, from entries to the rows that each block reads: shape (2, blocks, ..., rows)."""
    steps, blocks = sequence.block, sequence.length // sequence.block
    row = jnp.asarray(sequence.first_row)[:, None] + jnp.arange(sequence.rows, dtype=jnp.int32)
    p = sequence.order.shape[0] - sequence.closing.shape[0]
    entry = jnp.asarray(sequence.entry)[p + jnp.asarray(sequence.closing)[row]]
    block = jnp.arange(blocks, dtype=jnp.int32)[:, None]
    step = entry - block * steps
    inside = (step >= 0) & (step < steps)
    step = jnp.where(inside, step, 0)
    factor = jnp.where(inside, share[row], 0)[..., None]
    forward, backward = of_data[step, 0, block], of_data[steps - 1 - step, 1, block]
    return jnp.swapaxes(jnp.stack([forward * factor, backward * factor]), -1, -2)
