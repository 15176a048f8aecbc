r"""Standard errors of a smoothing spline, predicted from the data alone.

The smoothing spline is the posterior mean of an integrated Wiener process, which has a posterior variance (Wahba 1978).
That variance is far too large for smooth functions, whose interpolation error decreases faster with the distance
between knots than the process's, and it does not depend on the curvature. So several hypotheses are weighted by their
evidence in the data:

* The function is white noise integrated m times, observed at the knots without noise: m = 1, which is rough, or m = 4,
  which is smooth. For m = 4 the noise is uniform, or most of it is at the points: a cubic spline through values at the
  points, such as an encoder's, has jumps in its third derivative there, and so has a function of it. If the smoothing
  is above zero, the spline's own process is a hypothesis too: m = 2, with the observation noise that corresponds to the
  smoothing. Given a hypothesis, the spline's error at a place has a mean, the difference of the two posterior means,
  and a variance :math:`b \, v^p c`, with v the posterior variance of the process of unit scale.
* The exponent p lies between 1, the process's own, and :math:`4m / (2m - 1)`: on functions that are smooth on the scale
  of the knots, the error of splines of degree 2m - 1 is of the order of the 2m-th power of the distance.
* The local scale c is the ratio of the squared residuals near a place to those of all knots. It is estimated from
  nearby knots and shrunk towards 1, the more the fewer these are.

The evidence for a hypothesis is the predictive likelihood of each knot's value given all others, in all features. The
same leave-one-out residuals give the scale b of each feature. Finally all errors are multiplied by the factor with
which nine of ten residuals lie within the interval predicted for them.

The module `wiener` computes the posteriors of the processes.

References:
    Wahba, Journal of the Royal Statistical Society B 40 (1978). Geisser and Eddy, Journal of the American Statistical
    Association 74 (1979), for predictive likelihood. Karvonen et al., SIAM/ASA Journal on Uncertainty Quantification 8
    (2020), for the miscalibration of Gaussian processes on functions smoother than they are. Barber et al., Annals of
    Statistics 49 (2021), for intervals from the quantiles of leave-one-out residuals.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact

from ..._float64 import in_float64
from ..._math import safe_sqrt
from .sites import find_sites, normalise
from .wiener import compute_innovations, compute_posteriors, form_jump_noise

# For each process its m, the share of its noise at the points, and the number of sites
# with data from which on it is a hypothesis. The rough process always is: with few sites there is too little evidence
# against a process of higher order, whose errors are smaller. No command fitted these constants nor those below;
# `tests/interpolants/spline/test_error.py`, with `-m long`, checks the coverage that they give.
ORDERS, JUMP_SHARES, MIN_SITES = np.array([2, 1, 4, 4]), np.array([0, 0, 0, 0.9]), np.array([3.0, 0.0, 6.0, 6.0])
# The index of the spline's own process, whose posterior means are the spline's values.
SPLINE = 0
# How many exponents are considered, from the process's own to the highest; the arrays grow with it.
NUM_EXPONENTS = 4
# The weights, in numbers of residuals, of the priors that local scales are 1 and that the correction is 1. With less,
# errors follow the noise of few residuals; with more, they follow rough places and miscalibration less.
PRIOR_FOR_SCALE, PRIOR_FOR_CORRECTION = 1, 20
# Quantiles of the standard normal distribution.
NORMAL_95, NORMAL_90 = 1.6448536269514722, 1.2815515655446004


def predict_errors(
    knots: ArrayLike,
    values: Inexact[Array, "knots features"],
    points: ArrayLike,
    weights: ArrayLike,
    smoothing: ArrayLike = 0.0,
) -> Inexact[Array, "points features"]:
    r"""Predicts standard errors of the smoothing spline through the data, at the points.

    The spline's value :math:`\pm 1.645` standard errors holds the truth in nine cases of ten. Where its error has a
    known mean, rather than mean zero, a standard error is less than the root of the expected squared error.

    Args:
        knots: Shape (n,), ascending; equal neighbours count as one, whose value is the weighted mean of their data.
        values: Data, shape (n, d), real.
        points: Shape (p,), in any order. The truth may have jumps in its third derivative there.
        weights: Shape (n,), not negative, or bool; values of weight zero are not read.
        smoothing: :math:`\mu \ge 0`, of the spline, in the knots' unit cubed.

    Returns:
        Shape (p, d), in the data's unit and dtype, not negative. Zero at knots that are interpolated and for data on a
        straight line; infinite elsewhere with data at two places only, and everywhere with fewer than two data. With
        data at few places they are larger by the ratio of quantiles of Student's t to those of the normal distribution.
        Computed in float64, in O((n + p)^3) time and products of n-sized matrices with the data.

    References:
        As for the module.
    """
    rounding = float(jnp.finfo(values.dtype).eps)
    posterior = _prepare(knots, points, weights, smoothing)
    # Two programs, so that derivatives with respect to values do not compile the first, which is large.
    return _standard_errors(*posterior, values, points, weights, smoothing, rounding).astype(values.dtype)


@in_float64
@jax.jit
def _prepare(knots, points, weights, smoothing):
    knots, points, span = normalise(knots, points)
    sites = find_sites(knots, weights)
    # A quadrature rule that is exact for the highest order is exact for all.
    noise = form_jump_noise(jnp.concatenate([sites.place, points]), points, int(max(ORDERS)), JUMP_SHARES)
    data_variances = jnp.where(ORDERS == 2, smoothing / span / span / span, 0)
    innovations = compute_innovations(sites, points, ORDERS, noise)
    posteriors = compute_posteriors(sites, innovations, data_variances, int(max(ORDERS)))
    return sites, _neighbour_weights(sites, points), posteriors.means, posteriors.variances


@in_float64
@jax.jit
def _standard_errors(sites, neighbours, means, variances, values, points, weights, smoothing, rounding):
    """Computes errors; arrays have axes h, hypotheses; e, exponents; k, places: points, then sites; n; d, features."""
    has_data = weights.astype(float) > 0
    data = sites.average @ jnp.where(has_data[:, None], values, 0)
    # Relative to their size, so that squares neither underflow nor overflow.
    size = jnp.max(jnp.abs(data), axis=0, keepdims=True)
    size = jnp.where(size > 0, size, 1)
    data, p = data / size, len(points)
    present = sites.present

    # Leave-one-out residuals, at the sites with data of each process that has more of them than m.
    mean = jnp.einsum("hkn,nd->hkd", means, data)
    residual = data[None] - mean[:, p:]
    has_residuals = sites.num_present > ORDERS.astype(float)[:, None]
    is_residual, num_residuals = present[None] & has_residuals, jnp.where(has_residuals, sites.num_present, 1)
    square = jnp.where(is_residual[..., None], residual, 0) ** 2
    power = _raise_variances(variances, p, present, num_residuals)
    power_at_sites = jnp.where(is_residual[..., None], power[:, p:], 1)

    scale = jnp.einsum("hne,hnd->hed", 1 / power_at_sites, square) / num_residuals[..., None]
    # The squared residual that rounding of the data causes. Features that are straight lines have no weight in the
    # evidence.
    floor = rounding**2
    spline_scale = scale[SPLINE, 0]
    feature_weight = spline_scale / (spline_scale + floor) + floor
    feature_weight = feature_weight / jnp.sum(feature_weight)
    normalised_square = (
        jnp.einsum("hnd,hed->hne", square, feature_weight[None, None] / (scale + floor)) / power_at_sites
    )
    num_squares = _count_squares(sites, neighbours[p:], feature_weight)
    shrinkage = num_squares / (num_squares + PRIOR_FOR_SCALE)
    local_scale = jnp.exp(shrinkage * jnp.log(jnp.einsum("kn,hne->hke", neighbours, normalised_square) + 1e-12))
    mean_log_scale = jnp.einsum("hed,d->he", jnp.log(scale + floor), feature_weight)
    is_possible = (sites.num_present >= MIN_SITES) & ((ORDERS != 2) | (smoothing > 0))
    probability = _weigh_hypotheses(
        present,
        is_possible,
        num_residuals,
        power_at_sites * local_scale[:, p:],
        normalised_square / local_scale[:, p:],
        mean_log_scale,
    )

    variance = jnp.einsum("he,hke,hed->kd", probability, power * local_scale, scale)
    squared_bias = jnp.einsum("he,hkd->kd", probability, (mean - mean[SPLINE][None]) ** 2)
    inflation = _student_inflation(1 / jnp.maximum(sites.num_present - 2, 1) + 1 / (num_squares + PRIOR_FOR_SCALE))
    error = _half_width(variance[:p] * inflation, squared_bias[:p]) / NORMAL_95
    half_width = _half_width(variance[p:], squared_bias[p:])
    error = size * error * _correction(present, sites.num_present, residual[SPLINE], half_width)[None]
    # Data at two places do not determine the curvature.
    error = jnp.where(sites.num_present >= 3, error, jnp.where(variances[0, :p, None] > 0, jnp.inf, 0))
    return jnp.where(jnp.sum(has_data, dtype=float) >= 2, error, jnp.inf)


def _neighbour_weights(sites, points):
    """Returns weights of the two or three sites nearest to each place, points and then sites, other than the place."""
    n = len(sites.place)
    rank = np.arange(n, dtype=float)
    previous_site, next_site = sites.place[None, :-1], sites.place[None, 1:]
    fraction = jnp.clip((points[:, None] - previous_site) / (next_site - previous_site), 0, 1)
    position = jnp.concatenate([fraction @ sites.present[1:].astype(float), rank])
    is_other_site = np.concatenate([np.ones((len(points), n), bool), ~np.eye(n, dtype=bool)])
    weight = jnp.exp(-((position[:, None] - rank[None]) ** 2)) * (sites.present[None] & is_other_site).astype(float)
    total = jnp.sum(weight, axis=1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1)


def _raise_variances(variances, p, present, num_residuals):
    """Raises variances to the power of each exponent, relative to their geometric mean at the sites; axes h, k, e."""
    orders, is_uncertain = ORDERS.astype(float), variances > 0
    log_variance = jnp.log(jnp.where(is_uncertain, variances, 1))
    log_mean = jnp.einsum("hn,n->h", log_variance[:, p:], present.astype(float))[:, None] / num_residuals
    exponent = np.linspace(1, 4 * orders / (2 * orders - 1), NUM_EXPONENTS, axis=1)[:, None]
    return jnp.exp(exponent * jnp.where(is_uncertain, log_variance - log_mean, -jnp.inf)[..., None])


def _count_squares(sites, neighbours, feature_weight):
    """Computes the number of independent squares, by Kish's effective sample size over sites and over features."""
    concentration = sites.present.astype(float) @ jnp.sum(neighbours**2, axis=1)
    return sites.num_present / jnp.where(concentration > 0, concentration, 1) / jnp.sum(feature_weight**2)


def _weigh_hypotheses(present, is_possible, num_residuals, variance, square, mean_log_scale):
    """Computes the probability of each hypothesis and exponent, axes h and e, by its predictive likelihood.

    Args:
        present: Axis n.
        is_possible: Axis h.
        num_residuals: Axes h and 1.
        variance: The predicted variances of residuals for b = 1, axes h, n, e.
        square: Squared residuals over b times that variance, averaged over features.
        mean_log_scale: Of b, averaged over features; axes h, e.
    """
    deviance = jnp.einsum("hne,n->he", jnp.log(variance) + square, present.astype(float))
    log_likelihood = jnp.where(is_possible[:, None], -0.5 * (deviance + num_residuals * mean_log_scale), -jnp.inf)
    return jax.nn.softmax(log_likelihood, axis=(0, 1))


def _half_width(variance, squared_bias):
    """Computes the 90 % quantile of an error's size from its variance and its squared mean, to 3 per cent."""
    return NORMAL_90 * safe_sqrt(variance) + safe_sqrt(squared_bias + (NORMAL_95 - NORMAL_90) ** 2 * variance)


def _student_inflation(inverse_freedom):
    """Computes the squared ratio of the 95 % quantiles of Student's t and the normal distribution, to 3 per cent.

    Args:
        inverse_freedom: One over the degrees of freedom, of which there is at least one.
    """
    inverse_freedom = jnp.minimum(inverse_freedom, 1)
    return jnp.exp(inverse_freedom * (1.853 + 0.86 * inverse_freedom))


def _correction(present, count, residual, half_width):
    """Computes, for each feature, the 90 % quantile of residuals over half widths, shrunk towards 1."""
    is_positive = half_width > 0
    ratio = jnp.where(is_positive, jnp.abs(residual) / jnp.where(is_positive, half_width, 1), 1)
    ratio = jnp.sort(jnp.where(present[:, None], ratio, jnp.inf), axis=0)
    quantile = ratio[jnp.maximum(jnp.ceil(0.9 * count) - 1, 0).astype(jnp.int32)]
    weight = count / (count + PRIOR_FOR_CORRECTION)
    # Without data there is no ratio.
    return jnp.where(count > 0, weight * jnp.where(count > 0, quantile, 1) + 1 - weight, 1)
