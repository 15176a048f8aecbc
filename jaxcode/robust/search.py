"""Searches for outliers among workers by leave-one-out residuals; `jaxcode.robust.leave_one_out` has the criterion.

The process, its precision matrices and leave-one-out variances are `jaxcode.interpolants.spline.wiener`'s. All in
float64. Arrays have axes n, workers; c, outputs; r, runs of neighbouring workers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..interpolants.spline.sites import find_sites, normalise, replace_weights
from ..interpolants.spline.wiener import (
    compute_data_precision,
    compute_innovations,
    compute_posteriors,
    form_uniform_noise,
)

# How many neighbouring workers become outliers in one step at most: faulty neighbours support each other.
LONGEST_RUN = 3
# The description length that one more outlier adds, where that of an inlier's answers is about 1 for each output.
PRICE = 4.0
# The noise variance of each of two workers at one node, and of any other worker, in units of the median leave-one-out
# variance of a site. With less at shared nodes, the correct worker of a pair is as likely to be flagged as the faulty
# one. With less elsewhere, correct workers would be flagged at the ends of the curve, where workers are dense, if
# answers are noisy.
NOISE_OF_PAIRS, NOISE = 0.4, 0.1
# How many workers on either side residuals are compared with.
NEIGHBOURS = 5
# Of standard normal z, the mean of log(1 + z^2) and the median of z^2.
MEAN_LOG, MEDIAN_SQUARE = 0.533453179844, 0.454936423119


@jax.jit
def find_outliers(
    worker_nodes: Float[Array, "workers"],
    data_nodes: Float[Array, "data"],
    outputs: Float[Array, "workers outputs"],
    live: Bool[Array, "workers"],
    rounding: Float[Array, ""] | float,
    most: Float[Array, ""] | float,
    threshold: Float[Array, ""] | float,
) -> tuple[Bool[Array, "workers"], Float[Array, "workers"]]:
    """Finds the outliers and scores all workers.

    Args:
        worker_nodes: Ascending, float64.
        data_nodes: Strictly ascending, float64.
        outputs: Answers, float64; zero where not live.
        live: Which workers returned finite answers.
        rounding: The relative precision of the answers as they came.
        most: The largest fraction of the live workers, less two, that may be outliers.
        threshold: Outliers' pooled residuals exceed this multiple of an inlier's.

    Returns:
        Which workers are outliers, and the score of each, at least 1 for outliers.
    """
    problem = _prepare(worker_nodes, data_nodes, outputs, live, rounding, most)
    return _clear(problem, _search(problem), threshold)


class _Problem(NamedTuple):
    """Holds what is fixed during the search; precision and outputs are scaled to a unit diagonal of the precision.

    Attributes:
        precision: Of all live workers' answers, straight lines projected out, shape (n, n).
        outputs: Shape (n, c).
        live: Shape (n,).
        same_node: Which pairs of live workers share a node, shape (n, n).
        neighbours: Indices of the live workers next to each, n where there are no more, shape (n, 2 NEIGHBOURS + 1).
        floor: The scale b below which residuals are rounding, shape (c,).
        most: How many may be outliers.
    """

    precision: Array
    outputs: Array
    live: Array
    same_node: Array
    neighbours: Array
    floor: Array
    most: Array


class _Fit(NamedTuple):
    """Holds the fit of the curve through the inliers.

    Attributes:
        inliers: Shape (n,).
        precision: Of the inliers' answers, zero elsewhere, shape (n, n).
        residuals: The precision times the outputs, shape (n, c).
        num_inliers: Shape ().
        energy: The sum of the inliers' squared normalised residuals, shape (c,).
        distance: Of outliers from the curve, shape (n, c); zero for inliers.
        variance: Of the distances, for b = 1, shape (n,).
    """

    inliers: Array
    precision: Array
    residuals: Array
    num_inliers: Array
    energy: Array
    distance: Array
    variance: Array


def _prepare(worker_nodes, data_nodes, outputs, live, rounding, most):
    worker_nodes, data_nodes, _ = normalise(worker_nodes, data_nodes)
    sites = find_sites(worker_nodes, live)
    site_innovations = _innovations(sites, data_nodes)
    noiseless_posteriors = compute_posteriors(sites, site_innovations, jnp.zeros(1), 2)
    is_at = (sites.average > 0).astype(float)
    # The median leave-one-out variance, the unit of the noise; 1 if there are no answers.
    unit = _quantile(is_at.T @ jnp.where(sites.present, noiseless_posteriors.variances[0], 0), live, 0.5)
    unit = jnp.where(unit > 0, unit, 1)

    outputs, floor = _normalised(outputs, live, rounding)
    floor = floor / unit
    same_node = (is_at.T @ is_at) > 0
    noise = unit * _noise_variances(
        sites, is_at, same_node, noiseless_posteriors.means[0], noiseless_posteriors.variances[0], outputs, floor, unit
    )
    weights = jnp.where(live, 1 / noise, 0)
    sites = replace_weights(sites, weights)
    noisy_posteriors = compute_posteriors(sites, site_innovations, jnp.ones(1), 2)
    precision = compute_data_precision(sites, noisy_posteriors.precision[0], weights)

    scale = jnp.diagonal(precision)
    scale = jnp.sqrt(jnp.where(scale > 0, scale, 1))[:, None]
    most = jnp.floor((jnp.sum(live.astype(float)) - 2) * most)
    return _Problem(precision / (scale * scale.T), outputs * scale, live, same_node, _neighbours(live), floor, most)


def _normalised(outputs, live, rounding):
    """Divides outputs by their size and clips extreme ones; also returns the squares that rounding explains."""
    centre = _quantile(outputs.T, live, 0.5)
    # Outputs that differ by rounding alone are equal.
    width = jnp.maximum(_quantile(jnp.abs(outputs - centre[None]).T, live, 0.8), 1e-6 * jnp.abs(centre))
    size = jnp.where(width > 0, jnp.maximum(jnp.abs(centre), width), 1)
    centre, width, outputs = centre / size, width / size, outputs / size[None]
    # Extreme answers would leave no digits for others.
    outputs = jnp.clip(outputs, (centre - 1e4 * width)[None], (centre + 1e4 * width)[None])
    floor = (4 * rounding) ** 2 * jnp.where(width > 0, centre**2 + width**2, 1)
    return jnp.where(live[:, None], outputs, 0), floor


def _noise_variances(sites, is_at, same_node, means, variances, outputs, floor, unit):
    """Chooses the noise variance of each worker's answers, in units of the median leave-one-out variance."""
    num_at_node = jnp.sum(same_node, axis=1, dtype=float)
    mean = sites.average @ outputs
    residual = mean - means @ mean
    square = is_at.T @ jnp.where(sites.present[:, None], residual**2 / variances[:, None], 0)
    is_live = num_at_node > 0
    scale = _quantile(square.T, is_live, 0.5) / MEDIAN_SQUARE + floor
    # Three or more workers at one node show which one is wrong: the median of their deviations estimates the noise.
    deviation = (outputs - is_at.T @ mean) ** 2 * (num_at_node / jnp.maximum(num_at_node - 1, 1))[:, None]
    noise_estimate = _quantile(_pooled(deviation / scale[None]) ** 2, num_at_node > 1, 0.5) / unit
    noise_at_shared_nodes = jnp.where(
        num_at_node > 2, jnp.clip(noise_estimate, 0.1 * NOISE, NOISE_OF_PAIRS), NOISE_OF_PAIRS
    )
    return jnp.where(num_at_node > 1, noise_at_shared_nodes, NOISE)


def _innovations(sites, data_nodes):
    """Computes the sites' innovations for m = 2 and noise whose intensity is the cube of the data nodes' density."""
    noise = form_uniform_noise(sites.place, 2)
    # Constant between neighbouring sites: the density in the middle.
    middle = (sites.place[1:] + sites.place[:-1]) / 2
    log_density = jnp.interp(middle, (data_nodes[1:] + data_nodes[:-1]) / 2, -jnp.log(jnp.diff(data_nodes)))
    intensity = jnp.repeat(jnp.exp(3 * log_density), 2)
    noise = noise._replace(variance=noise.variance * intensity[None])
    return compute_innovations(sites, jnp.zeros(0), np.array([2]), noise)


def _neighbours(live):
    """Finds for each worker the live ones nearest to it in order; n where there are no more."""
    n = live.shape[0]
    count, rank = jnp.sum(live, dtype=jnp.int32), jnp.cumsum(live, dtype=jnp.int32) - 1
    in_order = jnp.argsort(~live, stable=True).astype(jnp.int32)
    first = jnp.clip(rank - NEIGHBOURS, 0, jnp.maximum(count - 1 - 2 * NEIGHBOURS, 0))
    window = jnp.minimum(first[:, None] + np.arange(2 * NEIGHBOURS + 1, dtype=np.int32)[None], n - 1)
    return jnp.where((window < count) & (window != rank[:, None]), in_order[window], n)


def _fit(problem, outliers):
    """Fits the curve through the inliers: marginalises the outliers' answers out of the precision."""
    precision, outputs, n = problem.precision, problem.outputs, len(outliers)
    inliers = problem.live & ~outliers
    block = jnp.where(outliers[:, None] & outliers[None], precision, jnp.eye(n))
    inverse = _solve(block, jnp.eye(n))
    columns = jnp.where(outliers[None], precision, 0)
    inlier_precision = precision - columns @ inverse @ columns.T
    inlier_precision = jnp.where(inliers[:, None] & inliers[None], inlier_precision, 0)
    residuals = inlier_precision @ outputs
    energy = jnp.maximum(jnp.sum(outputs * residuals, axis=0), 0)
    distance = inverse @ jnp.where(outliers[:, None], precision @ outputs, 0)
    distance = jnp.where(outliers[:, None], distance, 0)
    # The inverse of a matrix of unit diagonal has at least ones there, but for rounding.
    variance = jnp.maximum(jnp.diagonal(inverse), 1)
    return _Fit(inliers, inlier_precision, residuals, jnp.sum(inliers.astype(float)), energy, distance, variance)


def _search(problem):
    """Finds outliers by steepest descent of the description length."""
    n = len(problem.live)
    num_live = jnp.sum(problem.live.astype(float))
    # Runs start at every inlier, in order, and have one to LONGEST_RUN of them.
    start = np.tile(np.arange(n, dtype=np.int32), LONGEST_RUN)
    length = np.repeat(np.arange(1, LONGEST_RUN + 1, dtype=float), n)
    offset = np.arange(LONGEST_RUN, dtype=np.int32)[None]
    run, in_run = np.minimum(start[:, None] + offset, n - 1), offset < length[:, None]
    end = start + length

    def step(carry):
        outliers, num_steps, _ = carry
        fit = _fit(problem, outliers)
        freedom = jnp.maximum(fit.num_inliers - 2, 1)
        scale = fit.energy / freedom + problem.floor

        def growth(new_scale):
            """Computes how much longer the inliers' description becomes, for each output."""
            return (num_live - 2) * jnp.log(new_scale / scale[None])

        # Each run of inliers becomes outliers.
        member = jnp.argsort(~fit.inliers, stable=True).astype(jnp.int32)[run]
        block = fit.precision[member[:, :, None], member[:, None, :]]
        block = jnp.where(in_run[:, :, None] & in_run[:, None, :], block, jnp.eye(LONGEST_RUN)[None])
        inverse = _inverse_of_three(block)
        residual = jnp.where(in_run[:, :, None], fit.residuals[member], 0)
        distance = jnp.einsum("rij,rjc->ric", inverse, residual)
        energy = jnp.maximum(fit.energy[None] - jnp.sum(residual * distance, axis=1), 0)
        new_scale = energy / jnp.maximum(freedom - length, 1)[:, None] + problem.floor[None]
        variance = jnp.diagonal(inverse, axis1=1, axis2=2)[:, :, None] * new_scale[:, None]
        cost = jnp.log(jnp.prod(1 + distance**2 / variance, axis=1))
        change = jnp.mean(growth(new_scale) + cost, axis=1) + PRICE * length
        is_allowed = (end <= fit.num_inliers) & (jnp.sum(outliers.astype(float)) + length <= problem.most)
        change_by_run = jnp.where(is_allowed & (change < 0), change, jnp.inf)

        # Each outlier becomes an inlier.
        square = fit.distance**2 / fit.variance[:, None]
        new_scale = (fit.energy[None] + square) / (freedom + 1) + problem.floor[None]
        change = jnp.mean(growth(new_scale) - jnp.log1p(square / scale[None]), axis=1) - PRICE
        change_by_return = jnp.where(outliers, change, jnp.inf)

        best = _argmin(jnp.concatenate([change_by_run, change_by_return]))
        is_run = best < len(start)
        best_run = jnp.minimum(best, len(start) - 1)
        # Indices out of bounds are dropped.
        new_outliers = jnp.where(jnp.asarray(in_run)[best_run], member[best_run], n)
        more_outliers = outliers.at[new_outliers].set(True, mode="drop")
        fewer_outliers = outliers.at[jnp.where(is_run, n, best - len(start))].set(False, mode="drop")
        is_shorter = jnp.minimum(jnp.min(change_by_run), jnp.min(change_by_return)) < -1e-9
        return (
            jnp.where(is_shorter, jnp.where(is_run, more_outliers, fewer_outliers), outliers),
            num_steps + 1,
            is_shorter,
        )

    initial = jnp.zeros(n, bool), jnp.zeros((), jnp.int32), num_live > 2
    return jax.lax.while_loop(lambda carry: carry[2] & (carry[1] < n), step, initial)[0]


def _clear(problem, outliers, threshold):
    """Makes outliers inliers, the lowest score first, until all outliers' scores are 1 or more; returns scores too."""
    n = len(problem.live)

    def step(carry):
        outliers, _, _ = carry
        score = _scores(problem, outliers, threshold)
        is_low = outliers & (score < 1)
        candidate = _argmin(jnp.where(is_low, score, jnp.inf))
        return outliers & ~(is_low & (np.arange(n, dtype=np.int32) == candidate)), score, jnp.any(is_low)

    initial = outliers, jnp.zeros(n), jnp.bool_(True)
    return jax.lax.while_loop(lambda carry: carry[2], step, initial)[:2]


def _scores(problem, outliers, threshold):
    """Computes each worker's pooled residual in units of the largest that passes for a correct worker's."""
    fit = _fit(problem, outliers)
    # Leaving out all workers at a node, as those at one node agree too well to show how rough the curve is. The small
    # number stands for a prior where without this node nothing would be known.
    block = jnp.where(problem.same_node, fit.precision, 0) + jnp.diag(jnp.where(fit.inliers, 1e-9, 1.0))
    inverse = _solve(block, jnp.eye(len(outliers)))
    # The block's diagonal is at most 1, but for the prior and rounding.
    variance = jnp.maximum(jnp.diagonal(inverse), 0.5)[:, None]
    square_without_node = (inverse @ fit.residuals) ** 2 / variance
    scale = _quantile(square_without_node.T, fit.inliers, 0.5) / MEDIAN_SQUARE + problem.floor

    diagonal = jnp.diagonal(fit.precision)
    diagonal = jnp.where(diagonal > 0, diagonal, 1)
    inlier_residuals = _pooled(fit.residuals**2 / diagonal[:, None] / scale[None])
    outlier_residuals = _pooled(fit.distance**2 / fit.variance[:, None] / scale[None])
    residual = jnp.where(fit.inliers, inlier_residuals, jnp.where(outliers, outlier_residuals, 0))

    node_residual = jnp.where(fit.inliers, _pooled(square_without_node / scale[None]), residual)
    is_neighbour = problem.neighbours < len(outliers)
    neighbour_median = _quantile(jnp.append(node_residual, 0)[problem.neighbours], is_neighbour, 0.5)
    unit = jnp.maximum(jnp.maximum(_quantile(node_residual, fit.inliers, 0.5), 1), neighbour_median)
    median, upper_quantile = _quantiles(node_residual / unit, fit.inliers, (0.5, 0.7))
    # The normal distribution's 70 % quantile is 0.524 standard deviations above its median.
    return residual / (unit * jnp.maximum(median + 4.5 * (upper_quantile - median) / 0.524, threshold))


def _solve(matrix, columns):
    """Solves systems with a symmetric positive definite matrix."""
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix, lower=True), columns)


def _inverse_of_three(matrices):
    """Inverts symmetric 3 x 3 matrices, shape (..., 3, 3), by cross products, which compile fast."""
    a, b, c = (matrices[..., i, :] for i in range(3))
    adjugate = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)], axis=-2)
    return adjugate / jnp.sum(a * adjugate[..., 0, :], axis=-1)[..., None, None]


def _argmin(values):
    """Finds the index of the least value."""
    # In float32: with x64 off the reduction of wider numbers is lowered for narrow ones.
    return jax.lax.argmin(values.astype(jnp.float32), 0, jnp.int32)


def _pooled(squares):
    """Pools squared standardised residuals (n, c) to one number per worker, in the mean 1 for standard normal ones."""
    return jnp.sqrt(jnp.expm1(jnp.mean(jnp.log1p(squares), axis=1)) / np.expm1(MEAN_LOG))


def _quantile(values, mask, q):
    return _quantiles(values, mask, (q,))[0]


def _quantiles(values, mask, qs):
    """Computes quantiles over the last axis, of values in the mask; 0 if there are none."""
    mask = jnp.broadcast_to(mask, values.shape)
    sorted_values = jnp.sort(jnp.where(mask, values, jnp.inf), axis=-1)
    last_index = jnp.maximum(jnp.sum(mask.astype(float), axis=-1) - 1, 0)
    quantiles = []
    for q in qs:
        low_index = jnp.floor(q * last_index)
        fraction = q * last_index - low_index
        high_index = jnp.where(fraction > 0, low_index + 1, low_index)
        lower_value, upper_value = (
            jnp.take_along_axis(sorted_values, index.astype(jnp.int32)[..., None], axis=-1)[..., 0]
            for index in (low_index, high_index)
        )
        quantiles.append(jnp.where(jnp.any(mask, axis=-1), lower_value + fraction * (upper_value - lower_value), 0))
    return quantiles
