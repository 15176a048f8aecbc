r"""Wiener processes integrated m - 1 times, seen at knots: posterior means, which are splines, and variances.

All is linear algebra of the knots' size. Contrasts of the data that know nothing of polynomials below degree m are
divided differences,

.. math::
    z_j = m! \, [t_j, \ldots, t_{j+m}] y = \int u^{(m)} M_j, \qquad
    \mathrm{cov}(z) = b \, (R + \mu Q^T W^{-1} Q), \quad R_{ij} = \int M_i M_j,

with :math:`M_j` the B-spline of order m whose integral is one, and Q the coefficients of the differences. A value at a
point is the polynomial through the m knots nearest to it plus one more contrast, which the others predict. B-splines'
Gram matrices are well conditioned whatever the knots, where those of :math:`|s - t|^{2m-1}` lose every digit.

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
from jaxtyping import Array, Float, Shaped

from .._float64 import in_float64
from .sequence import SAME_PLACE


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
        live: How many have data.
        average: From data at the knots to their means at the sites, shape (n, knots).
    """

    place: Float[Array, "sites"]
    weight: Float[Array, "sites"]
    live: Array
    average: Float[Array, "sites knots"]

    @property
    def rank(self) -> Array:
        """0, 1, 2, ..."""
        return jnp.arange(self.place.shape[0], dtype=jnp.int32)


class Noise(NamedTuple):
    """White noise, which processes integrate, gathered at places.

    Attributes:
        at: Where, shape (q,).
        measure: Its variance there, shape (q,).
    """

    at: Float[Array, "q"]
    measure: Float[Array, "q"]


class Posteriors(NamedTuple):
    """What processes make of data at the sites: at points, then at each site when it is left out.

    Attributes:
        rows: From the data to posterior means, shape (orders, points + sites, sites).
        variance: Posterior variances for unit scale, shape (orders, points + sites).
    """

    rows: Float[Array, "orders places sites"]
    variance: Float[Array, "orders places"]


@in_float64
@jax.jit
def _unit_variances(knots, points, weights, smoothing):
    sites = find_sites(knots, weights)
    noise = even_noise(sites, points)
    noise = noise._replace(measure=noise.measure[None])
    process = integrated_processes(sites, points, (2,), noise, jnp.asarray(smoothing)[None])
    return jnp.where(sites.live >= 2, process.variance[0, : points.shape[0]], jnp.inf)


def find_sites(knots: Float[Array, "knots"], weights: Shaped[Array, "knots"]) -> Sites:
    """The places of knots whose weight is not zero, equal ones taken together."""
    # One more, at least, than the highest order has polynomials.
    size = max(knots.shape[0], 5)
    index = np.arange(size)
    live = weights > 0
    weights, span = weights.astype(knots.dtype), knots[-1] - knots[0]
    earlier = live & (index[: len(knots), None] > index[: len(knots)])
    opens = live & (knots - jnp.max(jnp.where(earlier, knots, -jnp.inf), axis=1) > SAME_PLACE * span)
    site = jnp.sum(opens & (earlier | np.eye(len(knots), dtype=bool)), axis=1) - 1
    count = jnp.sum(opens)
    member = jnp.where(live & (site == index[:, None]), weights, 0)
    total = jnp.sum(member, axis=1)
    beyond = index >= count
    total = jnp.where(beyond, 1, total)
    average = member / total[:, None]
    place = jnp.max(jnp.where(member > 0, knots, knots[0]), axis=1)
    place = jnp.where(beyond, jax.lax.stop_gradient(jnp.max(place) + (index - count + 1) * (span / size)), place)
    return Sites(place, total, count.astype(knots.dtype), average)


def even_noise(sites: Sites, points: Float[Array, "points"]) -> Noise:
    """Noise of unit intensity everywhere, exact for processes integrated once or not at all."""
    grid = jnp.sort(jnp.concatenate([sites.place, points]))
    gap = (grid[1:] - grid[:-1])[:, None]
    at = grid[:-1, None] + gap * (0.5 + np.array([-0.5, 0.5]) / math.sqrt(3))
    return Noise(at.ravel(), jnp.broadcast_to(gap / 2, at.shape).ravel())


def integrated_processes(
    sites: Sites,
    points: Float[Array, "points"],
    orders: tuple[int, ...],
    noise: Noise,
    smoothing: Float[Array, "orders"],
) -> Posteriors:
    """The posteriors under noise integrated m times, for several m; without smoothing values are seen exactly.

    All orders are one program, which is traced and compiled once, each a case of the highest.

    Args:
        sites: Where there are data.
        points: Where to read.
        orders: Each m, static.
        noise: What is integrated, the measures of shape (orders, q).
        smoothing: Of each order, shape (orders,).

    Returns:
        All attributes with a leading axis of orders.
    """
    place, n, p = sites.place, sites.place.shape[0], points.shape[0]
    highest = max(orders)
    target, column = jnp.concatenate([place, points]), np.arange(highest)
    before = np.arange(n)[:, None] + np.arange(-highest, 1)
    ahead = jnp.sum(place < points[:, None], axis=1)
    away = target[:, None] - noise.at
    responses = jnp.stack([jnp.where(away > 0, away ** (m - 1), 0) / math.factorial(m - 1) for m in orders])

    def posterior(m, response, measure, smoothing):
        # Each site is foretold from m before it, each point from m around it.
        start = jnp.clip(ahead - m // 2, 0, jnp.maximum(sites.live - m, 0))
        start = jnp.concatenate([sites.rank - m, start]).astype(jnp.int32)[:, None]
        there = (sites.rank >= m) & (sites.rank < sites.live)
        valid = jnp.concatenate([there, np.ones(p, bool)])[:, None]
        near = jnp.clip(start + column, 0, n - 1)
        t, used = place[near], valid & (column < m)
        others = used[:, :, None] & used[:, None, :] & ~np.eye(highest, dtype=bool)
        apart = jnp.where(others, t[:, :, None] - t[:, None, :], 1)
        lagrange = jnp.prod(jnp.where(others, (target[:, None] - t)[:, None, :], 1) / apart, axis=2)
        foretold = jnp.where(used[..., None] & (near[..., None] == sites.rank), lagrange[..., None], 0).sum(axis=1)
        novel = jnp.concatenate([valid[:n] * jnp.eye(n), jnp.zeros((p, n))]) - foretold

        # Noise beyond those sites is a polynomial to them, but for rounding.
        low, high = jnp.minimum(t[:, :1], target[:, None]), jnp.maximum(place[near[:, m - 1]][:, None], target[:, None])
        innovation = novel @ response[:n] + jnp.concatenate([jnp.zeros_like(response[:n]), response[n:]])
        innovation = jnp.where(valid & (noise.at >= low) & (noise.at <= high), innovation, 0)
        covariance = (innovation * measure) @ innovation.T + smoothing * (novel / sites.weight) @ novel.T

        # Symmetric and banded, scaled to a diagonal of ones: row i holds what stands at i - highest, ..., i.
        square = jnp.diagonal(covariance)
        scale = jnp.where(there, 1 / jnp.sqrt(jnp.where(there, square[:n], 1)), 0)
        scaled = scale[:, None] * covariance[:n] * jnp.concatenate([scale, np.ones(p)])
        bands = jnp.where(before >= 0, scaled[np.arange(n)[:, None], before], 0).at[:, highest].set(1)
        white = _whitened(bands, jnp.concatenate([scale[:, None] * novel[:n], scaled[:, n:]], axis=1))
        white, known = white[:, :n], white[:, n:]
        variance = jnp.maximum(square[n:] - jnp.sum(known**2, axis=0), 0)
        precision = white.T @ white
        own = jnp.diagonal(precision)
        own = jnp.where(own > 0, own, 1)
        rows = jnp.concatenate([foretold[n:] + known.T @ white, jnp.eye(n) - precision / own[:, None]])
        return Posteriors(rows, jnp.concatenate([variance, 1 / own]))

    return jax.vmap(posterior)(np.array(orders), responses, noise.measure, smoothing)


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
