r"""White noise integrated m times, seen at knots: posterior means, which are splines, and variances.

All is linear algebra of the knots' size. Each knot is foretold from the m before it by the polynomial through them,
each point from m around it. What the polynomial misses is an integral of the noise alone,

.. math::
    z = u(t) - \sum_j \ell_j u(t_j) = \int M \, dW, \qquad
    M(s) = \frac{(t - s)_+^{m-1} - \sum_j \ell_j (t_j - s)_+^{m-1}}{(m - 1)!},

with M zero but between those knots: a B-spline, but for scale. Products of these are well conditioned whatever the
knots, where the Gram matrices of :math:`|s - t|^{2m-1}` lose every digit, and banded. What knots missed, together, says
what to expect of a point's.

References:
    Wahba, Journal of the Royal Statistical Society B 40 (1978). Curry and Schoenberg, Journal d'Analyse Mathematique 17
    (1966).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped

from ..._float64 import in_float64
from ..abstract import SAME_SITE


def unit_variances(
    knots: ArrayLike, points: ArrayLike, weights: ArrayLike, smoothing: ArrayLike = 0.0
) -> Float[Array, "points"]:
    r"""Posterior variances of the integrated Wiener process of unit scale whose mean the smoothing spline is.

    With :math:`\kappa(s, t) = |s - t|^3 / 12`, d the spline's row for a point, K the kernel among knots and c from
    knots to the point, each is :math:`d^T K d - 2 d^T c + \mu \sum_i d_i^2 / w_i`.

    Args:
        knots: Shape (n,), ascending; neighbours may be equal.
        points: Shape (p,), in any order.
        weights: Shape (n,), not negative; zero leaves the knot out.
        smoothing: :math:`\mu \ge 0`.

    Returns:
        Shape (p,), in the knots' unit cubed; float64 with x64 on, else float32. Infinite with data at fewer than two
        places.

    References:
        Wahba, Journal of the Royal Statistical Society B 40 (1978).

    >>> unit_variances(np.array([-1.0, 1.0]), np.array([0.0, 0.5, 1.0]), np.ones(2)) * 96
    Array([16.,  9.,  0.], dtype=float32)
    """
    return _unit_variances(knots, points, weights, smoothing).astype(jnp.result_type(float))


class Sites(NamedTuple):
    """Places that have data, in ascending order, followed by others that have none.

    Attributes:
        place: Where, strictly ascending, shape (n,); at least as many as knots.
        weight: Of the data there, together; 1 at those that have none.
        live: How many have data, as a number of the same dtype.
        average: From data at the knots to their means at the sites, shape (n, knots).
    """

    place: Float[Array, "sites"]
    weight: Float[Array, "sites"]
    live: Float[Array, ""]
    average: Float[Array, "sites knots"]

    @property
    def present(self) -> Bool[Array, "sites"]:
        """Which have data."""
        return jnp.arange(self.place.shape[0]) < self.live


class Processes(NamedTuple):
    """What processes make of data at the sites: at points, then at each site when it is left out.

    Attributes:
        rows: From the data to posterior means, shape (orders, points + sites, sites).
        variance: Posterior variances for noise of unit intensity, shape (orders, points + sites); of no meaning at
            sites that have no data or are too few.
    """

    rows: Float[Array, "orders places sites"]
    variance: Float[Array, "orders places"]


@in_float64
@jax.jit
def _unit_variances(knots, points, weights, smoothing):
    sites = find_sites(knots, weights)
    processes = integrated_processes(sites, points, np.array([2]), np.zeros(1), jnp.reshape(smoothing, 1))
    return jnp.where(sites.live >= 2, processes.variance[0, : points.shape[0]], jnp.inf)


def find_sites(knots: Float[Array, "knots"], weights: Shaped[Array, "knots"]) -> Sites:
    """The places of knots whose weight is not zero, equal ones taken together."""
    n = knots.shape[0]
    # One more, at least, than the highest order has polynomials.
    size = max(n, 5)
    rank = np.arange(size)
    live, span = weights > 0, knots[-1] - knots[0]
    earlier = live & np.tri(n, k=-1, dtype=bool)
    opens = live & (knots - jnp.max(jnp.where(earlier, knots, -jnp.inf), axis=1) > SAME_SITE * span)
    # Sums as products, here and below, for they compile in a third of the time.
    site = np.tri(n) @ opens
    member = jnp.where(live & (site == 1 + rank[:, None]), weights.astype(knots.dtype), 0)
    count = site[-1]
    beyond = rank >= count
    place = jnp.max(jnp.where(member > 0, knots, knots[0]), axis=1)
    place = jnp.where(beyond, jax.lax.stop_gradient(jnp.max(place) + (rank - count + 1) * (span / size)), place)
    total = jnp.where(beyond, 1, member @ np.ones(n))
    return Sites(place, total, count, member / total[:, None])


def integrated_processes(
    sites: Sites,
    points: Float[Array, "points"],
    orders: np.ndarray,
    bent: np.ndarray,
    smoothing: Float[Array, "orders"],
) -> Processes:
    """The posteriors under noise integrated m times, for several m in one program that is compiled once.

    Args:
        sites: Where there are data.
        points: Where to read.
        orders: Each m, known.
        bent: What share of each one's noise stands at the points, in proportion to the gaps between them, known. The
            rest is even.
        smoothing: The variance of a datum of weight one, for each m; zero where data are seen exactly.

    """
    place, n, p, highest = sites.place, sites.place.shape[0], points.shape[0], max(orders)
    at, measures = _noise(place, points, highest, bent[:, None])
    target, column = jnp.concatenate([place, points]), np.arange(highest)
    ahead = (place < points[:, None]) @ np.ones(n)
    before = np.arange(n)[:, None] + np.arange(-highest, 1)
    away = target[:, None] - at
    responses = jnp.stack([jnp.where(away > 0, away ** (m - 1), 0) / math.factorial(m - 1) for m in orders.tolist()])

    def process(m, response, measure, smoothing):
        start = jnp.clip(ahead - m // 2, 0, jnp.maximum(sites.live - m, 0))
        start = jnp.concatenate([np.arange(n) - m, start])[:, None].astype(jnp.int32)
        there = sites.present & (np.arange(n) >= m)
        valid = jnp.concatenate([there, np.ones(p, bool)])[:, None]
        near = jnp.clip(start + column, 0, n - 1)
        t, used = place[near], valid & (column < m)
        others = used[:, :, None] & used[:, None, :] & ~np.eye(highest, dtype=bool)
        apart = jnp.where(others, t[:, :, None] - t[:, None, :], 1)
        share = jnp.prod(jnp.where(others, (target[:, None] - t)[:, None, :], 1) / apart, axis=2)
        is_near = used[:, :, None] & (near[:, :, None] == np.arange(n))
        foretold = jnp.sum(jnp.where(is_near, share[:, :, None], 0), axis=1)
        missed = jnp.concatenate([jnp.diag(there.astype(place.dtype)), jnp.zeros((p, n))]) - foretold

        # Beyond these sites only rounding is left of it.
        low = jnp.minimum(t[:, :1], target[:, None])
        high = jnp.maximum(place[near[:, m - 1]], target)[:, None]
        of_noise = missed @ response[:n] + jnp.pad(response[n:], ((n, 0), (0, 0)))
        of_noise = jnp.where(valid & (at >= low) & (at <= high), of_noise, 0)
        covariance = (of_noise * measure) @ of_noise.T + smoothing * (missed / sites.weight) @ missed.T

        # Symmetric and banded, scaled to a diagonal of ones: row i holds what stands at i - highest, ..., i.
        square = jnp.diagonal(covariance)
        scale = jnp.where(there, 1 / jnp.sqrt(jnp.where(there, square[:n], 1)), 0)
        scaled = scale[:, None] * covariance[:n] * jnp.concatenate([scale, np.ones(p)])
        bands = jnp.where(before >= 0, scaled[np.arange(n)[:, None], before], 0).at[:, highest].set(1)
        white = _whitened(bands, jnp.concatenate([scale[:, None] * missed[:n], scaled[:, n:]], axis=1))
        white, known = white[:, :n], white[:, n:]
        variance = jnp.maximum(square[n:] - np.ones(n) @ known**2, 0)

        # The inverse covariance of the data, polynomials unknown, foretells each from the others.
        precision = white.T @ white
        own = jnp.diagonal(precision)
        own = jnp.where(own > 0, own, 1)
        without = jnp.eye(n) - precision / own[:, None]
        rows = jnp.concatenate([foretold[n:] + known.T @ white, without])
        return Processes(rows, jnp.concatenate([variance, 1 / own]))

    return jax.vmap(process)(orders, responses, measures, smoothing)


def _noise(place, points, exact, bent):
    """Where noise is gathered, shape (q,), and how much of it there, shape (orders, q).

    Between neighbours at so many places that products of polynomials of degree exact - 1 have exact integrals.
    """
    grid = jnp.sort(jnp.concatenate([place, points]))
    node, weight = np.polynomial.legendre.leggauss(exact)
    gap = (grid[1:] - grid[:-1])[:, None]
    even = grid[:-1, None] + gap * (node + 1) / 2
    points = jnp.sort(points)
    between = jnp.diff(points, prepend=2 * points[0] - points[min(1, len(points) - 1)])
    around = (between + jnp.append(between[1:], between[-1])) / 2
    measures = [(1 - bent) * (gap * weight / 2).ravel(), bent * around]
    return jnp.concatenate([even.ravel(), points]), jnp.concatenate(measures, axis=1)


def _whitened(bands, columns):
    """Columns from the left by the inverse of the Cholesky factor of a banded matrix, eliminated row by row.

    Batched factorizations of LAPACK's that run side by side can wait for each other forever on a CPU of few cores.
    """
    m = bands.shape[1] - 1

    def step(carry, row):
        # What is left of the m rows before this one.
        block, rest = carry
        band, column = row
        block = jnp.concatenate([jnp.concatenate([block, band[:m, None]], axis=1), band[None]])
        rest = jnp.concatenate([rest, column[None]])
        pivot, first = block[0, 0], rest[0]
        factor = block[1:, :1] / pivot
        return (block[1:, 1:] - factor * block[0, 1:], rest[1:] - factor * first), first / jnp.sqrt(pivot)

    # A row comes out m steps after it went in.
    last = jnp.zeros((m, m + 1), bands.dtype).at[:, m].set(1)
    none = jnp.zeros((m, columns.shape[1]), columns.dtype)
    rows = jnp.concatenate([bands, last]), jnp.concatenate([columns, none])
    return jax.lax.scan(step, (jnp.eye(m, dtype=bands.dtype), none), rows)[1][m:]
