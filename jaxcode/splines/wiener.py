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


class Process(NamedTuple):
    """What a process of one order makes of data at the sites; variances for unit scale.

    Attributes:
        precision: Inverse covariance of the data where polynomials below the order are unknown, shape (sites, sites).
        rows: From the data to posterior means at the points, shape (points, sites).
        variance: Posterior variances there, shape (points,).
    """

    precision: Float[Array, "sites sites"]
    rows: Float[Array, "points sites"]
    variance: Float[Array, "points"]


@in_float64
@jax.jit
def _unit_variances(knots, points, weights, smoothing):
    sites = find_sites(knots, weights)
    return jnp.where(sites.live >= 2, integrated_process(sites, points, 2, smoothing).variance, jnp.inf)


def find_sites(knots: Float[Array, "knots"], weights: Shaped[Array, "knots"]) -> Sites:
    """The places of knots whose weight is not zero, equal ones taken together."""
    # One more, at least, than the highest order has polynomials.
    n = max(knots.shape[0], 5)
    index = jnp.arange(n, dtype=jnp.int32)
    weights, span = weights.astype(knots.dtype), knots[-1] - knots[0]
    apart = jnp.concatenate([jnp.zeros(1, bool), jnp.diff(knots) > SAME_PLACE * span])
    site = jnp.cumsum(apart, dtype=jnp.int32)
    total = jnp.zeros(n, knots.dtype).at[site].add(weights)
    live = total > 0
    count = jnp.sum(live, dtype=jnp.int32)
    rank = jnp.where(live, jnp.cumsum(live) - 1, count + jnp.cumsum(~live) - 1).astype(jnp.int32)
    total = jnp.zeros_like(total).at[rank].set(total)
    place = jnp.zeros(n, knots.dtype).at[rank[site]].set(knots)
    beyond = index >= count
    last = place[jnp.maximum(count - 1, 0)]
    place = jnp.where(beyond, jax.lax.stop_gradient(last + (index - count + 1) * (span / n)), place)
    total = jnp.where(beyond, 1, total)
    average = jnp.where(rank[site] == index[:, None], weights / total[:, None], 0)
    return Sites(place, total, count, average)


def integrated_process(
    sites: Sites, points: Float[Array, "points"], m: int, smoothing: Float[Array, ""] | None = None
) -> Process:
    """The posterior under a Wiener process integrated m - 1 times; without smoothing there is no noise."""
    place, n, p = sites.place, sites.place.shape[0], points.shape[0]
    row = np.arange(n - m)[:, None]
    window = row + np.arange(m + 1)
    away = place[window][:, :, None] - place[window][:, None, :] + np.eye(m + 1)
    there = sites.rank[m:] < sites.live
    coefficients = jnp.where(there[:, None], math.factorial(m) / jnp.prod(away, axis=2), 0)
    contrasts = jnp.zeros((n - m, n)).at[row, window].set(coefficients)

    at, measure = _quadrature(place, m)
    splines = jnp.where(there, _bsplines(place, at, m), 0)
    gram = (splines * measure[:, None]).T @ splines
    if smoothing is not None:
        gram = gram + smoothing * (contrasts / sites.weight) @ contrasts.T
    # Symmetric of bandwidth m, scaled to a diagonal of ones: row i holds what stands at i, i - 1, ..., i - m.
    before = row - np.arange(m + 1)
    scale = jnp.where(there, 1 / jnp.sqrt(jnp.where(there, jnp.diagonal(gram), 1)), 0)
    bands = jnp.where(before >= 0, scale[:, None] * gram[row, before] * scale[before], 0)
    bands = bands.at[:, 0].set(1)

    start = jnp.sum(place < points[:, None], axis=1, dtype=jnp.int32) - m // 2
    near = jnp.clip(start, 0, jnp.maximum(sites.live - m, 0))[:, None] + np.arange(m, dtype=np.int32)
    t = place[near]
    to_point = points[:, None] - t
    others = ~np.eye(m, dtype=bool)
    lagrange = jnp.prod(
        jnp.where(others, to_point[:, None, :], 1) / jnp.where(others, t[:, :, None] - t[:, None, :], 1), axis=2
    )
    polynomial = jnp.zeros((p, n)).at[np.arange(p)[:, None], near].set(lagrange)

    # The contrast of those sites and the point.
    size = jnp.prod(to_point, axis=1) / math.factorial(m)
    ends = jnp.full((p, 1), jnp.inf)
    local = jnp.maximum(
        jnp.concatenate([-ends, t], axis=1), jnp.minimum(jnp.concatenate([t, ends], axis=1), points[:, None])
    )
    at, measure = _quadrature(local, m)
    own = measure * _bsplines(local, at, m)[..., 0]
    splines = jnp.where(there, _bsplines(place, at.reshape(-1), m), 0).reshape(*at.shape, n - m)
    cross = size[:, None] * jnp.einsum("pq,pqj->pj", own, splines)
    variance = size**2 * jnp.sum(own**2 / jnp.where(measure > 0, measure, 1), axis=1)
    if smoothing is not None:
        cross = cross - smoothing * (polynomial / sites.weight) @ contrasts.T
        variance = variance + smoothing * jnp.sum(polynomial**2 / sites.weight, axis=1)

    both = scale[:, None] * jnp.concatenate([contrasts, cross.T], axis=1)
    white = _whitened(bands, both)
    white, known = white[:, :n], white[:, n:]
    variance = jnp.maximum(variance - jnp.sum(known**2, axis=0), 0)
    return Process(white.T @ white, polynomial + known.T @ white, variance)


def _whitened(bands, columns):
    """Columns from the left by the inverse of the Cholesky factor of a banded matrix, row by row.

    Batched factorizations of LAPACK's that run side by side can wait for each other forever on a CPU of few cores.
    """
    m = bands.shape[1] - 1

    def step(carry, row):
        # The factor's rows i - 1, ..., i - m, each from its diagonal to the left, and what has been solved there.
        factor, solved = carry
        band, column = row
        new = [None] * (m + 1)
        for j in range(m, 0, -1):
            known = sum(new[k] * factor[j - 1, k - j] for k in range(j + 1, m + 1))
            new[j] = (band[j] - known) / factor[j - 1, 0]
        new[0] = jnp.sqrt(band[0] - sum(new[j] ** 2 for j in range(1, m + 1)))
        column = (column - sum(new[j] * solved[j - 1] for j in range(1, m + 1))) / new[0]
        factor = jnp.concatenate([jnp.stack(new)[None], factor[:-1]])
        return (factor, jnp.concatenate([column[None], solved[:-1]])), column

    unit = jnp.zeros((m, m + 1), bands.dtype).at[:, 0].set(1)
    start = unit, jnp.zeros((m, columns.shape[1]), bands.dtype)
    return jax.lax.scan(step, start, (bands, columns))[1]


def _bsplines(knots, at, order):
    """B-splines whose integrals are one, at places: shape (..., places, knots - order)."""
    t, x = knots[..., None, :], at[..., :, None]
    gap = t[..., 1:] - t[..., :-1]
    found = jnp.where((x >= t[..., :-1]) & (x < t[..., 1:]), 1 / jnp.where(gap > 0, gap, 1), 0)
    for k in range(2, order + 1):
        span = t[..., k:] - t[..., :-k]
        mixed = (x - t[..., :-k]) * found[..., :-1] + (t[..., k:] - x) * found[..., 1:]
        found = k / (k - 1) * mixed / jnp.where(span > 0, span, 1)
    return found


def _quadrature(knots, order):
    """Places and weights that integrate products of two such splines exactly, all gaps' in one row."""
    at, weight = np.polynomial.legendre.leggauss(order)
    gap = (knots[..., 1:] - knots[..., :-1])[..., None]
    flat = (*knots.shape[:-1], -1)
    return (knots[..., :-1, None] + gap * (at + 1) / 2).reshape(flat), (gap * weight / 2).reshape(flat)
