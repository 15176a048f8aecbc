r"""Computes posteriors of an m-times integrated Wiener process given noisy data: means (splines) and variances.

The process u has white noise as its m-th derivative and a flat prior on polynomials of degree m - 1; for m = 2 the
posterior mean is the cubic smoothing spline. Each site t is predicted from the m sites before it by the polynomial
through them, with Lagrange coefficients :math:`\ell_j`, and each point from m sites around it. The prediction's
innovation depends on the noise alone,

.. math::
    z = u(t) - \sum_j \ell_j u(t_j) = \int M(s) \, dW(s), \qquad
    M(s) = \frac{(t - s)_+^{m-1} - \sum_j \ell_j (t_j - s)_+^{m-1}}{(m - 1)!},

where M vanishes outside the m + 1 places: up to its scale it is a B-spline. Gram matrices of B-splines are banded and
well conditioned whatever the sites, where those of :math:`|s - t|^{2m-1}` lose every digit.

Let C be the matrix from data to innovations and :math:`\Sigma` the innovations' covariance. The data's precision, with
polynomials projected out, is :math:`P = C^T \Sigma^{-1} C`. The leave-one-out residual of datum i is
:math:`(P y)_i / P_{ii}` and its variance :math:`1 / P_{ii}`. At a point, the mean is the prediction plus the
conditional mean of the point's innovation given the others.

References:
    Wahba, Journal of the Royal Statistical Society B 40 (1978). Curry and Schoenberg, Journal d'Analyse Mathematique 17
    (1966). Dubrule, Mathematical Geology 15 (1983), for leave-one-out residuals from the precision matrix.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from ..._float64 import in_float64
from .sites import Sites, find_sites, normalise


def unit_variances(
    knots: ArrayLike, points: ArrayLike, weights: ArrayLike, smoothing: ArrayLike = 0.0
) -> Float[Array, "points"]:
    r"""Computes posterior variances of the integrated Wiener process of unit scale, whose mean is the smoothing spline.

    With :math:`\kappa(s, t) = |s - t|^3 / 12`, d the spline's row for a point, K the kernel among knots and c from
    knots to the point, each is :math:`d^T K d - 2 d^T c + \mu \sum_i d_i^2 / w_i`.

    Args:
        knots: Shape (n,), ascending; neighbours may be equal.
        points: Shape (p,), in any order.
        weights: Shape (n,), not negative; zero leaves the knot out.
        smoothing: :math:`\mu \ge 0`, in the knots' unit cubed.

    Returns:
        Shape (p,), in the knots' unit cubed; float64 with x64 on, else float32. Infinite with data at fewer than two
        places.

    References:
        Wahba, Journal of the Royal Statistical Society B 40 (1978).

    >>> unit_variances(np.array([-1.0, 1.0]), np.array([0.0, 0.5, 1.0]), np.ones(2)) * 96
    Array([16.,  9.,  0.], dtype=float32)
    """
    return _unit_variances(knots, points, weights, smoothing).astype(jnp.result_type(float))


class Noise(NamedTuple):
    """Holds the white noise that drives processes, as a quadrature rule for integrals over its intensity.

    Attributes:
        abscissa: Shape (q,).
        variance: The intensity times the quadrature weight, shape (orders, q).
    """

    abscissa: Float[Array, "abscissae"]
    variance: Float[Array, "orders abscissae"]


class Innovations(NamedTuple):
    """Holds predictions of sites and points from nearby sites, and the innovations.

    An axis of sites + points holds the sites first.

    Attributes:
        prediction: The matrix from data to predictions, shape (orders, sites + points, sites).
        contrasts: The matrix C from data to innovations; for points, which have no data, minus their predictions.
        covariance: The innovations' covariance with exact data, shape (orders, sites + points, sites + points).
        is_defined: Which sites have an innovation: those with data except the first m, shape (orders, sites).
    """

    prediction: Float[Array, "orders sites+points sites"]
    contrasts: Float[Array, "orders sites+points sites"]
    covariance: Float[Array, "orders sites+points sites+points"]
    is_defined: Bool[Array, "orders sites"]


class Posteriors(NamedTuple):
    """Holds the posteriors of several processes given data at sites.

    An axis of points + sites holds the points first, then each site with its own datum left out.

    Attributes:
        means: The matrices from data to posterior means, shape (orders, points + sites, sites).
        variances: Posterior variances, shape (orders, points + sites): of u at points, of the left-out datum at sites.
            Arbitrary at sites that have no data, and where at most m sites have data.
        precision: The data's precision, with polynomials projected out, shape (orders, sites, sites).
    """

    means: Float[Array, "orders points+sites sites"]
    variances: Float[Array, "orders points+sites"]
    precision: Float[Array, "orders sites sites"]


def form_uniform_noise(places: Float[Array, "places"], num_abscissae: int) -> Noise:
    """Makes noise of unit intensity: Gauss-Legendre quadrature between neighbouring places.

    Args:
        places: In any order.
        num_abscissae: Of each gap; products of polynomials of degree num_abscissae - 1 are integrated exactly.
    """
    grid = jnp.sort(places)
    node, weight = np.polynomial.legendre.leggauss(num_abscissae)
    gap = (grid[1:] - grid[:-1])[:, None]
    abscissa = grid[:-1, None] + gap * ((node[None] + 1) / 2)
    return Noise(abscissa.ravel(), (gap * (weight[None] / 2)).reshape(1, -1))


def form_jump_noise(
    places: Float[Array, "places"], points: Float[Array, "points"], num_abscissae: int, shares: np.ndarray
) -> Noise:
    """Makes noise of which a share is concentrated at points, where the process's derivative of order m - 1 jumps.

    Args:
        places: As for `form_uniform_noise`, which makes the rest of the noise. The points should be among them.
        points: Where jumps are, with a variance in proportion to the gaps around each.
        num_abscissae: As for `form_uniform_noise`.
        shares: The share of each process, from 0 to 1, static.
    """
    uniform, points, shares = form_uniform_noise(places, num_abscissae), jnp.sort(points), shares[:, None]
    gap = jnp.diff(points, prepend=2 * points[:1] - points[min(1, len(points) - 1)][None])
    jumps = (gap + jnp.append(gap[1:], gap[-1])) / 2
    variance = jnp.concatenate([(1 - shares) * uniform.variance, shares * jumps[None]], axis=1)
    return Noise(jnp.concatenate([uniform.abscissa, points]), variance)


def compute_innovations(sites: Sites, points: Float[Array, "points"], orders: np.ndarray, noise: Noise) -> Innovations:
    """Computes the innovations of processes of several orders, as one program that is compiled once.

    Args:
        sites: Where there are data.
        points: Where to predict.
        orders: Each process's m, from 1 to 4, static.
        noise: The noise that drives each process. Its quadrature must be exact for products of the kernels M.

    Returns:
        The innovations of all processes.
    """
    highest, n = int(max(orders)), sites.place.shape[0]
    target = jnp.concatenate([sites.place, points])
    distance = target[:, None] - noise.abscissa[None]
    # How places respond to a unit of noise at each abscissa: the truncated powers in M.
    responses = jnp.stack(
        [jnp.where(distance > 0, distance ** (m - 1), 0) / math.factorial(m - 1) for m in orders.tolist()]
    )

    def compute_one(m, response, variance):
        stencil, is_defined = _stencils(sites, points, m, highest)
        is_used = is_defined[:, None] & (np.arange(highest, dtype=np.int32) < m)[None]
        prediction = _lagrange_matrix(sites.place, target, stencil, is_used)
        # A point's own value is no datum.
        has_datum = is_defined & (np.arange(target.shape[0]) < n)
        contrasts = jnp.where(np.eye(target.shape[0], n, dtype=bool) & has_datum[:, None], 1, 0) - prediction
        kernel = _evaluate_b_splines(sites.place, target, stencil, contrasts, response, noise.abscissa, m)
        kernel = jnp.where(is_defined[:, None], kernel, 0)
        return Innovations(prediction, contrasts, (kernel * variance[None]) @ kernel.T, is_defined[:n])

    return jax.vmap(compute_one)(orders.astype(np.int32), responses, noise.variance)


def compute_posteriors(
    sites: Sites, innovations: Innovations, data_variances: Float[Array, "orders"], bandwidth: int
) -> Posteriors:
    """Conditions processes on data at the sites.

    Args:
        sites: Where there are data.
        innovations: Of the processes.
        data_variances: The variance of a datum of weight one, for each process; zero where data are exact.
        bandwidth: The highest m, static.

    Returns:
        The posteriors of all processes.
    """
    return jax.vmap(functools.partial(_condition, sites, bandwidth))(innovations, data_variances)


def compute_data_precision(
    sites: Sites, precision: Float[Array, "sites sites"], weights: Float[Array, "knots"]
) -> Float[Array, "knots knots"]:
    """Computes the precision of data at knots from that of their means at sites.

    Args:
        sites: From `find_sites` with `weights`.
        precision: The precision of the weighted means at sites, whose noise has variance one over weight.
        weights: One over the variance of each datum's noise; zero for knots left out.
    """
    # Deviations from a site's mean consist of noise only: diag(w) - A^T diag(W) A is their precision.
    return jnp.diag(weights) + sites.average.T @ (precision - jnp.diag(sites.weight)) @ sites.average


@in_float64
@jax.jit
def _unit_variances(knots, points, weights, smoothing):
    knots, points, span = normalise(knots, points)
    sites = find_sites(knots, weights)
    noise = form_uniform_noise(jnp.concatenate([sites.place, points]), 2)
    smoothing = jnp.reshape(smoothing, 1) / span / span / span
    innovations = compute_innovations(sites, points, np.array([2]), noise)
    posteriors = compute_posteriors(sites, innovations, smoothing, 2)
    variances = posteriors.variances[0, : points.shape[0]]
    return jnp.where(sites.num_present >= 2, variances * span * span * span, jnp.inf)


def _stencils(sites, points, m, highest):
    """Chooses the sites, its stencil, from which each target is predicted; targets are the sites, then the points.

    Returns:
        Indices of sites, shape (n + p, highest), of which the first m count; and which targets have a prediction: all
        points, and the sites with data except the first m.
    """
    n = sites.place.shape[0]
    rank = np.arange(n, dtype=np.int32)
    num_before = (sites.place[None] < points[:, None]).astype(sites.place.dtype) @ np.ones(n)
    start = jnp.clip(
        num_before - (m // 2).astype(num_before.dtype), 0, jnp.maximum(sites.num_present - m.astype(float), 0)
    )
    start = jnp.concatenate([rank - m, start.astype(jnp.int32)])
    stencil = jnp.clip(start[:, None] + np.arange(highest, dtype=np.int32)[None], 0, n - 1)
    is_defined = jnp.concatenate([sites.present & (rank >= m), np.ones(points.shape[0], bool)])
    return stencil, is_defined


def _lagrange_matrix(place, target, stencil, is_used):
    """Forms the matrix from data at sites to the values, at the targets, of the polynomials through their stencils."""
    highest, knot = stencil.shape[1], place[stencil]
    is_other = is_used[:, :, None] & is_used[:, None, :] & ~np.eye(highest, dtype=bool)[None]
    denominator = jnp.where(is_other, knot[:, :, None] - knot[:, None, :], 1)
    numerator = jnp.where(is_other, (target[:, None] - knot)[:, None, :], 1)
    coefficient = jnp.prod(numerator / denominator, axis=2)
    is_selected = is_used[:, :, None] & (stencil[:, :, None] == np.arange(place.shape[0], dtype=np.int32)[None, None])
    return jnp.sum(jnp.where(is_selected, coefficient[:, :, None], 0), axis=1)


def _evaluate_b_splines(place, target, stencil, contrasts, response, abscissa, m):
    """Evaluates the innovations' kernels M at the abscissae; outside their support rounding errors are set to zero."""
    n = place.shape[0]
    kernel = contrasts @ response[:n] + jnp.pad(response[n:], ((n, 0), (0, 0)))
    low = jnp.minimum(place[stencil[:, 0]], target)[:, None]
    high = jnp.maximum(place[stencil[:, m - 1]], target)[:, None]
    return jnp.where((abscissa[None] >= low) & (abscissa[None] <= high), kernel, 0)


def _condition(sites, bandwidth, innovations, data_variance):
    """Conditions the points, and each site's datum on those of other sites; for one process."""
    prediction, contrasts, covariance, is_defined = innovations
    covariance = covariance + data_variance * (contrasts / sites.weight[None]) @ contrasts.T
    n = contrasts.shape[1]
    num_points = contrasts.shape[0] - n
    # The sites' covariance is banded. Scaled to a unit diagonal; row i of `bands` holds columns i - m to i.
    square = jnp.diagonal(covariance)
    scale = jnp.where(is_defined, 1 / jnp.sqrt(jnp.where(is_defined, square[:n], 1)), 0)
    scaled = scale[:, None] * covariance[:n] * jnp.concatenate([scale, np.ones(num_points)])[None]
    column = np.arange(n)[:, None] + np.arange(-bandwidth, 1)[None]
    bands = jnp.where(column >= 0, scaled[np.arange(n)[:, None], column], 0).at[:, bandwidth].set(1)
    whitened = _whiten(bands, jnp.concatenate([scale[:, None] * contrasts[:n], scaled[:, n:]], axis=1))
    contrasts, cross = whitened[:, :n], whitened[:, n:]

    precision = contrasts.T @ contrasts
    diagonal = jnp.diagonal(precision)
    diagonal = jnp.where(diagonal > 0, diagonal, 1)
    means = [prediction[n:] + cross.T @ contrasts, jnp.eye(n) - precision / diagonal[:, None]]
    variances = [jnp.maximum(square[n:] - np.ones(n) @ cross**2, 0), 1 / diagonal]
    return Posteriors(jnp.concatenate(means), jnp.concatenate(variances), precision)


def _whiten(bands, columns):
    """Multiplies columns by the inverse of the Cholesky factor of a banded matrix, eliminated row by row.

    LAPACK is not used: its batched factorizations that run concurrently can deadlock on a CPU of few cores.
    """
    m = bands.shape[1] - 1

    def step(carry, row):
        # The Schur complement after the rows eliminated so far, in the m rows before this one.
        block, block_columns = carry
        band, column = row
        block = jnp.concatenate([jnp.concatenate([block, band[:m, None]], axis=1), band[None]])
        block_columns = jnp.concatenate([block_columns, column[None]])
        pivot, first_row = block[0, 0], block_columns[0]
        factor = block[1:, :1] / pivot
        return (
            block[1:, 1:] - factor * block[:1, 1:],
            block_columns[1:] - factor * first_row[None],
        ), first_row / jnp.sqrt(pivot)

    # A row is eliminated m steps after it is read.
    padding_bands = jnp.zeros((m, m + 1), bands.dtype).at[:, m].set(1)
    padding_columns = jnp.zeros((m, columns.shape[1]), columns.dtype)
    rows = jnp.concatenate([bands, padding_bands]), jnp.concatenate([columns, padding_columns])
    return jax.lax.scan(step, (jnp.eye(m, dtype=bands.dtype), padding_columns), rows)[1][m:]
