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
from jaxtyping import Array, Float

from .sequence import Sequence


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


def two_filter(
    sequence: Sequence,
    knots: Float[Array, "knots"],
    points: Float[Array, "points"],
    weights: Float[Array, "knots"],
    smoothing: Float[Array, ""],
) -> Blocks:
    r"""Prepares a smoothing spline for any data at the knots and for its values at the points.

    Args:
        sequence: How knots and points interleave.
        knots: Ascending, float64; neighbours may be equal.
        points: Ascending, float64.
        weights: Not negative, float64; zero leaves the knot out.
        smoothing: :math:`\mu \ge 0`.

    Returns:
        The blocks. All finite, even with one weight above zero or none.
    """
    gaps, entered, share = _entries(sequence, knots, points, weights)
    # The last axis tells the filters apart: 0 runs as the sequence does, 1 against it.
    gap = jnp.stack([_delay(gaps), gaps[::-1]], axis=1)
    weight = jnp.stack([entered, entered[::-1]], axis=1)
    predicted = _covariances(gap, weight, smoothing)
    ahead = jnp.stack([gaps, _delay(gaps)[::-1]], axis=1)
    of_data, of_state = _pull(
        tuple(_per_block(sequence, v) for v in (*_observations(predicted, weight, smoothing), ahead)),
        _per_block(sequence, _seeds(sequence, predicted)),
        _per_block(sequence, _columns(sequence, gaps.shape[0])),
        sequence.points,
    )
    from_data = _to_rows(sequence, of_data, share)
    at_points, at_edge = slice(None, sequence.points), slice(sequence.points, None)
    return Blocks(
        from_data=from_data[0, :, at_points] + from_data[1, :, at_points],
        from_left=of_state[0, :, at_points],
        from_right=of_state[1, :, at_points],
        push_data=from_data[:, :, at_edge],
        push_state=of_state[:, :, at_edge],
    )


def _entries(sequence, knots, points, weights):
    """Gaps to the next entry and weights entered, both padded to whole blocks; and each knot's share of its site."""
    n, p = knots.shape[0], points.shape[0]
    length = -(-(n + p) // sequence.block) * sequence.block
    gaps = _pad(jnp.diff(jnp.concatenate([points, knots])[sequence.order]), length)
    if sequence.distinct:
        total, share = weights, jnp.ones_like(weights)
        entered = weights
    else:
        total = jnp.zeros(n, weights.dtype).at[sequence.closing].add(weights)
        share = weights / jnp.where(total > 0, total, 1)[sequence.closing]
        entered = jnp.where(sequence.closing == jnp.arange(n, dtype=jnp.int32), total, 0)
    entered = jnp.concatenate([jnp.zeros(p, weights.dtype), entered])[sequence.order]
    return gaps, _pad(entered, length), share


def _pad(values, length):
    return jnp.concatenate([values, jnp.zeros(length - values.shape[0], values.dtype)])


def _delay(gaps):
    """Gaps to the next entry, read as gaps to the one before."""
    return jnp.concatenate([jnp.zeros(1, gaps.dtype), gaps[:-1]])


def _per_block(sequence, of_entries):
    """(entries, 2, ...) to (entries of a block, 2, blocks, ...), blocks in the sequence's order for both filters."""
    by_block = of_entries.reshape(-1, sequence.block, *of_entries.shape[1:])
    return jnp.stack([jnp.moveaxis(by_block[:, :, 0], 0, 1), jnp.moveaxis(by_block[::-1, :, 1], 0, 1)], axis=1)


def _covariances(
    gap: Float[Array, "entries 2"], weight: Float[Array, "entries 2"], smoothing: Float[Array, ""]
) -> Float[Array, "entries 5 2"]:
    """Each filter's covariance at every entry, before what is observed there."""
    zero, one = jnp.zeros_like(gap), jnp.ones_like(gap)
    h, h2, h3, h4 = gap, gap**2 / 2, gap**3 / 3, gap**4 / 12
    across = jnp.stack(
        [
            jnp.stack([one, 2 * h, 2 * h2, zero, h3], 1),
            jnp.stack([zero, one, h, zero, h2], 1),
            jnp.stack([zero, zero, one, zero, h], 1),
            jnp.stack([h, 2 * h2, h3, one, h4], 1),
            jnp.stack([zero, zero, zero, zero, one], 1),
        ],
        1,
    )

    def step(p, entry):
        across, w = entry
        p = jnp.sum(across * p, axis=1)
        p11, p12, p22, det, q = p
        value, slope, both = smoothing * p11, smoothing * p12, w * det + smoothing * p22
        updated = jnp.stack([value, slope, both, smoothing * det, w * p11 + smoothing * q])
        return jnp.where(w > 0, updated / _unit(p, w, smoothing), p), p

    unknown = jnp.zeros((5, 2), gap.dtype).at[3].set(1)
    return jax.lax.scan(step, unknown, (across, weight))[1]


def _unit(covariance, weight, smoothing):
    """What observations are divided by, so that q becomes 1; or before the second site, the slope's variance."""
    p11, _, p22, det, q = covariance
    certain = weight * p11 + smoothing * q
    return jnp.where(weight > 0, jnp.where(certain > 0, certain, weight * det + smoothing * p22), 1)


def _observations(predicted, weight, smoothing):
    """What an observation does at every entry: how much of (a, b) remains, what of b_2 and of the data goes where."""
    covariance = jnp.moveaxis(predicted, 1, 0)
    p11, p12, _, det, _ = covariance
    over = 1 / _unit(covariance, weight, smoothing)
    of_data = weight * over
    return jnp.where(weight > 0, smoothing * over, 1), of_data, of_data * p11, of_data * p12, of_data * det


def _seeds(sequence, predicted):
    """What (a, b) of each filter are multiplied by at every point; zero at other entries. Shape (entries, 2, 4)."""
    p, r = predicted[:, :, 0], predicted[::-1, :, 1]
    p11, p12, p22, det, q = p.T
    r11, r12, r22, other_det, other_q = r.T
    total = det * other_q + other_det * q + p11 * r22 + p22 * r11 + 2 * p12 * r12
    is_point = _pad(sequence.order < sequence.entry.shape[0] - sequence.closing.shape[0], total.shape[0])
    met = is_point & (total > 0)
    over = jnp.where(met, 1 / jnp.where(met, total, 1), 0)

    def weigh(own, other):
        # Without a second site anywhere, the value at the only one.
        slope = own[:, 2]
        only = jnp.where(is_point & ~met & (slope > 0), 1 / jnp.where(slope > 0, slope, 1), 0)
        return jnp.stack([other[:, 3] * over, 0 * over, other[:, 0] * over + only, other[:, 1] * over], axis=1)

    return jnp.stack([weigh(p, r), weigh(r, p)[::-1]], axis=1)


def _columns(sequence, length):
    """Each entry's place among the points of its block, -1 for a knot; for either filter, shape (entries, 2)."""
    n = sequence.closing.shape[0]
    p = sequence.order.shape[0] - n
    first = jnp.repeat(jnp.asarray(sequence.first_point), sequence.block)
    point = jnp.concatenate([sequence.order, jnp.full(length - n - p, p, jnp.int32)])
    column = jnp.where(point < p, point - first, -1)
    return jnp.stack([column, column[::-1]], axis=1)


def _pull(along, seeds, columns, num_points):
    """Runs both filters backwards from every point to the data: the rows of their matrices.

    Rows are the block's points, and after them the four parts of the state that the filter leaves the block with.

    Returns:
        What each entry's data are multiplied by, shape (steps, 2, blocks, rows), and what the state that the filter
        enters the block with is, shape (2, blocks, rows, 4).
    """
    _, _, blocks, _ = seeds.shape
    row = jnp.arange(num_points + 4, dtype=jnp.int32)

    def step(state, entry):
        a1, a2, b1, b2 = state
        (remains, seen, into_a1, into_a2, into_b1, ahead), seed, column = jax.tree.map(lambda v: v[..., None], entry)
        h, h2, h3 = ahead, ahead**2 / 2, ahead**3 / 6
        a1, a2, b1 = a1 + h * b1 + h2 * b2, a2 + h * a1 + h2 * b1 + h3 * b2, b1 + h * b2
        of_data = into_a1 * a1 + into_a2 * a2 + into_b1 * b1
        before = jnp.stack([remains * a1, remains * a2, remains * b1, remains * b2 - seen * a2])
        return before + jnp.moveaxis(seed, 2, 0) * (row == column), of_data

    leaves = (row == num_points + jnp.arange(4, dtype=jnp.int32)[:, None]).astype(seeds.dtype)
    state = jnp.broadcast_to(leaves[:, None, None], (4, 2, blocks, num_points + 4))
    state, of_data = jax.lax.scan(step, state, (along, seeds, columns), reverse=True)
    return of_data, jnp.moveaxis(state, 0, -1)


def _to_rows(sequence, of_data, share):
    """What data are multiplied by, from entries to the rows that each block reads: shape (2, blocks, ..., rows)."""
    steps, _, blocks, _ = of_data.shape
    row = jnp.asarray(sequence.first_row)[:, None] + jnp.arange(sequence.rows, dtype=jnp.int32)
    p = sequence.entry.shape[0] - sequence.closing.shape[0]
    entry = jnp.asarray(sequence.entry)[p + jnp.asarray(sequence.closing)[row]]
    block = jnp.arange(blocks, dtype=jnp.int32)[:, None]
    step = entry - block * steps
    inside = (step >= 0) & (step < steps)
    step = jnp.where(inside, step, 0)
    factor = jnp.where(inside, share[row], 0)[..., None]
    forward, backward = of_data[step, 0, block], of_data[steps - 1 - step, 1, block]
    return jnp.swapaxes(jnp.stack([forward * factor, backward * factor]), -1, -2)
