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

# No command fitted these constants. What each trades off was seen on the codes and attacks of `tests/robust`; the tests
# named are those of `test_leave_one_out`.

# The most neighbouring inliers that one step makes outliers: shorter runs leave faulty neighbours that support each
# other, longer ones take more time, and another inverse than `_invert_3x3`. See
# `test_faulty_neighbours_that_support_each_other_are_flagged`.
MAX_RUN = 3
# The description length that one more outlier adds, where that of an inlier's answers is about 1 for each output. At 16
# twice as many faulty workers are missed as at 4. Lower costs miss fewer, and leave more workers to the test by score.
# No test depends on it.
OUTLIER_COST = 4.0
# The noise variance of each of two workers at one node, and of a worker alone, in units of the median leave-one-out
# variance of a site. With less at shared nodes, the correct worker of a pair is as likely to be flagged as the faulty
# one. With a tenth elsewhere, correct workers whose answers are noisy are flagged; with four times as much, half more
# of the faulty workers are missed. See `test_hardly_any_correct_worker_is_flagged`.
PAIR_NOISE, NOISE = 0.4, 0.1
# With how many workers on either side residuals are compared: with one, faulty neighbours hide each other; the more
# they are, the less the comparison follows a roughness of f that varies. See the same test as for MAX_RUN.
NEIGHBOURS_PER_SIDE = 5
# Ratios pass up to the inliers' median plus NUM_DEVIATIONS standard deviations, estimated from the QUANTILE: fewer flag
# correct workers, more miss faulty ones; a higher quantile is moved by faulty workers that the search missed. With few
# groups the limit in `detection` is larger and decides.
QUANTILE, NUM_DEVIATIONS = 0.7, 4.5
# Of standard normal z: the mean of log(1 + z^2), the median of z^2, and the 70 % quantile.
MEAN_LOG, MEDIAN_SQUARE, NORMAL_QUANTILE = 0.533453179844, 0.454936423119, 0.524


@jax.jit
def find_outliers(
    worker_nodes: Float[Array, "workers"],
    data_nodes: Float[Array, "data"],
    outputs: Float[Array, "workers outputs"],
    valid: Bool[Array, "workers"],
    rounding: Float[Array, ""] | float,
    max_fraction: Float[Array, ""] | float,
    threshold: Float[Array, ""] | float,
) -> tuple[Bool[Array, "workers"], Float[Array, "workers"]]:
    """Finds the outliers and scores all workers.

    Args:
        worker_nodes: Ascending, float64.
        data_nodes: Strictly ascending, float64.
        outputs: Answers, float64; zero where not valid.
        valid: Which workers returned finite answers; only theirs are used.
        rounding: The relative precision of the answers' dtype.
        max_fraction: The largest fraction of the valid workers, less two, that may be outliers.
        threshold: The smallest multiple of a typical residual at which a worker is an outlier.

    Returns:
        Which workers are outliers, and the score of each, at least 1 for outliers.
    """
    max_outliers = jnp.floor((jnp.sum(valid.astype(float)) - 2) * max_fraction)
    problem = _prepare(worker_nodes, data_nodes, outputs, valid, rounding, max_outliers)
    return _prune_outliers(problem, _search(problem), threshold)


class _Problem(NamedTuple):
    """Holds what is fixed during the search; precision and outputs are scaled to a unit diagonal of the precision.

    Attributes:
        precision: Of all valid workers' answers, straight lines projected out, shape (n, n).
        outputs: Shape (n, c).
        valid: Shape (n,).
        same_node: Which pairs of valid workers share a node, shape (n, n).
        neighbours: Indices of the valid workers nearest to each, n where there are no more, shape
            (n, 2 NEIGHBOURS_PER_SIDE + 1).
        min_scale: The scale b of residuals that are rounding errors, shape (c,).
        max_outliers: How many workers may be outliers, shape ().
    """

    precision: Array
    outputs: Array
    valid: Array
    same_node: Array
    neighbours: Array
    min_scale: Array
    max_outliers: Array


class _Fit(NamedTuple):
    """Holds the fit of the curve through the inliers.

    Attributes:
        inliers: Shape (n,).
        precision: Of the inliers' answers, zero elsewhere, shape (n, n).
        residuals: The precision times the outputs, shape (n, c).
        num_inliers: Shape ().
        energy: The sum of the inliers' squared normalised residuals, shape (c,).
        freedom: The residuals' degrees of freedom, shape ().
        scale: The estimate of b, shape (c,).
        distance: Of outliers from the curve, shape (n, c); zero for inliers.
        variance: Of the distances, for b = 1, shape (n,).
    """

    inliers: Array
    precision: Array
    residuals: Array
    num_inliers: Array
    energy: Array
    freedom: Array
    scale: Array
    distance: Array
    variance: Array


def _prepare(worker_nodes, data_nodes, outputs, valid, rounding, max_outliers):
    worker_nodes, data_nodes, _ = normalise(worker_nodes, data_nodes)
    sites = find_sites(worker_nodes, valid)
    site_innovations = _innovations(sites, data_nodes)
    noiseless = compute_posteriors(sites, site_innovations, jnp.zeros(1), 2)
    is_at_site = (sites.average > 0).astype(float)
    variances = is_at_site.T @ jnp.where(sites.present, noiseless.variances[0], 0)
    # 1 if there are no answers.
    median_variance = _quantile(variances, valid, 0.5)
    median_variance = jnp.where(median_variance > 0, median_variance, 1)

    outputs, rounding_square = _normalise_outputs(outputs, valid, rounding)
    min_scale = rounding_square / median_variance
    same_node = (is_at_site.T @ is_at_site) > 0
    noise = median_variance * _noise_variances(
        sites, is_at_site, same_node, noiseless.means[0], noiseless.variances[0], outputs, min_scale, median_variance
    )
    weights = jnp.where(valid, 1 / noise, 0)
    sites = replace_weights(sites, weights)
    noisy = compute_posteriors(sites, site_innovations, jnp.ones(1), 2)
    precision = compute_data_precision(sites, noisy.precision[0], weights)

    diagonal = jnp.diagonal(precision)
    root = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))[:, None]
    return _Problem(
        precision / (root * root.T), outputs * root, valid, same_node, _find_neighbours(valid), min_scale, max_outliers
    )


def _normalise_outputs(outputs, valid, rounding):
    """Divides outputs by their size and clips extreme ones; also computes the squares of rounding errors."""
    centre = _quantile(outputs.T, valid, 0.5)
    # Outputs that differ by rounding alone are equal.
    width = jnp.maximum(_quantile(jnp.abs(outputs - centre[None]).T, valid, 0.8), 1e-6 * jnp.abs(centre))
    size = jnp.where(width > 0, jnp.maximum(jnp.abs(centre), width), 1)
    centre, width, outputs = centre / size, width / size, outputs / size[None]
    # Extreme answers would leave no digits for others.
    outputs = jnp.clip(outputs, (centre - 1e4 * width)[None], (centre + 1e4 * width)[None])
    rounding_square = (4 * rounding) ** 2 * jnp.where(width > 0, centre**2 + width**2, 1)
    return jnp.where(valid[:, None], outputs, 0), rounding_square


def _noise_variances(sites, is_at_site, same_node, means, variances, outputs, min_scale, median_variance):
    """Chooses the noise variance of each worker's answers, in units of the median leave-one-out variance."""
    num_at_node = jnp.sum(same_node, axis=1, dtype=float)
    valid, shares_node = num_at_node > 0, num_at_node > 1
    site_mean = sites.average @ outputs
    residual = site_mean - means @ site_mean
    square = is_at_site.T @ jnp.where(sites.present[:, None], residual**2 / variances[:, None], 0)
    scale = _quantile(square.T, valid, 0.5) / MEDIAN_SQUARE + min_scale
    # Three or more workers at one node show which one is wrong, so that their deviations can tell the noise.
    bessel = num_at_node / jnp.maximum(num_at_node - 1, 1)
    deviation = (outputs - is_at_site.T @ site_mean) ** 2 * bessel[:, None]
    estimate = _quantile(_pool(deviation / scale[None]) ** 2, shares_node, 0.5) / median_variance
    shared_noise = jnp.where(num_at_node > 2, jnp.clip(estimate, 0.1 * NOISE, PAIR_NOISE), PAIR_NOISE)
    return jnp.where(shares_node, shared_noise, NOISE)


def _innovations(sites, data_nodes):
    """Computes the sites' innovations for m = 2 and noise whose intensity is the cube of the data nodes' density."""
    noise = form_uniform_noise(sites.place, 2)
    # Constant between neighbouring sites: the density in the middle.
    middle = (sites.place[1:] + sites.place[:-1]) / 2
    log_density = jnp.interp(middle, (data_nodes[1:] + data_nodes[:-1]) / 2, -jnp.log(jnp.diff(data_nodes)))
    intensity = jnp.repeat(jnp.exp(3 * log_density), 2)
    noise = noise._replace(variance=noise.variance * intensity[None])
    return compute_innovations(sites, jnp.zeros(0), np.array([2]), noise)


def _find_neighbours(valid):
    """Finds for each worker the valid ones nearest to it in order; n where there are no more."""
    n = valid.shape[0]
    count, rank = jnp.sum(valid, dtype=jnp.int32), jnp.cumsum(valid, dtype=jnp.int32) - 1
    in_order = jnp.argsort(~valid, stable=True).astype(jnp.int32)
    first = jnp.clip(rank - NEIGHBOURS_PER_SIDE, 0, jnp.maximum(count - 1 - 2 * NEIGHBOURS_PER_SIDE, 0))
    window = jnp.minimum(first[:, None] + np.arange(2 * NEIGHBOURS_PER_SIDE + 1, dtype=np.int32)[None], n - 1)
    return jnp.where((window < count) & (window != rank[:, None]), in_order[window], n)


def _fit(problem, outliers):
    """Fits the curve through the inliers: marginalises the outliers' answers out of the precision."""
    precision, outputs, n = problem.precision, problem.outputs, len(outliers)
    inliers = problem.valid & ~outliers
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
    num_inliers = jnp.sum(inliers.astype(float))
    freedom = jnp.maximum(num_inliers - 2, 1)
    scale = energy / freedom + problem.min_scale
    return _Fit(inliers, inlier_precision, residuals, num_inliers, energy, freedom, scale, distance, variance)


def _search(problem):
    """Finds outliers by steepest descent of the description length."""
    n = len(problem.valid)

    def step(carry):
        outliers, num_steps, _ = carry
        fit = _fit(problem, outliers)
        members, run_changes = _changes_by_runs(problem, fit, outliers)
        changes = jnp.concatenate([run_changes, _changes_by_returns(problem, fit, outliers)])
        best, num_runs = _argmin(changes), len(run_changes)
        is_run = best < num_runs
        # Indices out of bounds are dropped.
        more_outliers = outliers.at[members[jnp.minimum(best, num_runs - 1)]].set(True, mode="drop")
        fewer_outliers = outliers.at[jnp.where(is_run, n, best - num_runs)].set(False, mode="drop")
        is_shorter = jnp.min(changes) < -1e-9
        return (
            jnp.where(is_shorter, jnp.where(is_run, more_outliers, fewer_outliers), outliers),
            num_steps + 1,
            is_shorter,
        )

    initial = jnp.zeros(n, bool), jnp.zeros((), jnp.int32), jnp.sum(problem.valid.astype(float)) > 2
    return jax.lax.while_loop(lambda carry: carry[2] & (carry[1] < n), step, initial)[0]


def _changes_by_runs(problem, fit, outliers):
    """Computes how much longer the description is if a run of neighbouring inliers becomes outliers, for every run.

    Returns:
        The workers of each run, shape (r, MAX_RUN), n where it is shorter; and the changes, shape (r,), infinite where
        the description is not shorter or the run is not allowed.
    """
    n = len(outliers)
    # Runs start at every inlier, in order, and have one to MAX_RUN of them.
    start = np.tile(np.arange(n, dtype=np.int32), MAX_RUN)
    length = np.repeat(np.arange(1, MAX_RUN + 1, dtype=float), n)
    offset = np.arange(MAX_RUN, dtype=np.int32)[None]
    is_in_run = offset < length[:, None]
    members = jnp.argsort(~fit.inliers, stable=True).astype(jnp.int32)[np.minimum(start[:, None] + offset, n - 1)]

    block = fit.precision[members[:, :, None], members[:, None, :]]
    block = jnp.where(is_in_run[:, :, None] & is_in_run[:, None, :], block, jnp.eye(MAX_RUN)[None])
    inverse = _invert_3x3(block)
    residual = jnp.where(is_in_run[:, :, None], fit.residuals[members], 0)
    distance = jnp.einsum("rij,rjc->ric", inverse, residual)
    energy = jnp.maximum(fit.energy[None] - jnp.sum(residual * distance, axis=1), 0)
    scale = energy / jnp.maximum(fit.freedom - length, 1)[:, None] + problem.min_scale[None]
    variance = jnp.diagonal(inverse, axis1=1, axis2=2)[:, :, None] * scale[:, None]
    cost = jnp.log(jnp.prod(1 + distance**2 / variance, axis=1))
    change = jnp.mean(_inlier_changes(problem, fit, scale) + cost, axis=1) + OUTLIER_COST * length
    num_outliers = jnp.sum(outliers.astype(float)) + length
    is_allowed = (start + length <= fit.num_inliers) & (num_outliers <= problem.max_outliers)
    return jnp.where(is_in_run, members, n), jnp.where(is_allowed & (change < 0), change, jnp.inf)


def _changes_by_returns(problem, fit, outliers):
    """Computes how much longer the description is if an outlier becomes an inlier, infinite for inliers."""
    square = fit.distance**2 / fit.variance[:, None]
    scale = (fit.energy[None] + square) / (fit.freedom + 1) + problem.min_scale[None]
    cost = jnp.log1p(square / fit.scale[None])
    change = jnp.mean(_inlier_changes(problem, fit, scale) - cost, axis=1) - OUTLIER_COST
    return jnp.where(outliers, change, jnp.inf)


def _inlier_changes(problem, fit, scale):
    """Computes how much longer the inliers' description is with another scale b, for each output."""
    return (jnp.sum(problem.valid.astype(float)) - 2) * jnp.log(scale / fit.scale[None])


def _prune_outliers(problem, outliers, threshold):
    """Makes outliers inliers, the lowest score first, until all outliers' scores are 1 or more; returns scores too."""
    n = len(problem.valid)

    def step(carry):
        outliers, _, _ = carry
        score = _scores(problem, outliers, threshold)
        is_low = outliers & (score < 1)
        lowest = _argmin(jnp.where(is_low, score, jnp.inf))
        return outliers & ~(is_low & (np.arange(n, dtype=np.int32) == lowest)), score, jnp.any(is_low)

    initial = outliers, jnp.zeros(n), jnp.bool_(True)
    return jax.lax.while_loop(lambda carry: carry[2], step, initial)[:2]


def _scores(problem, outliers, threshold):
    """Computes each worker's pooled residual in units of the largest that passes for a correct worker's."""
    fit = _fit(problem, outliers)
    # All workers at a node are left out together, since they agree too well to show how rough the curve is. The small
    # number is the precision of a prior, for where nothing is known without this node.
    block = jnp.where(problem.same_node, fit.precision, 0) + jnp.diag(jnp.where(fit.inliers, 1e-9, 1.0))
    inverse = _solve(block, jnp.eye(len(outliers)))
    # The block's diagonal is at most 1, but for the prior and rounding.
    variance = jnp.maximum(jnp.diagonal(inverse), 0.5)[:, None]
    node_square = (inverse @ fit.residuals) ** 2 / variance
    scale = _quantile(node_square.T, fit.inliers, 0.5) / MEDIAN_SQUARE + problem.min_scale

    diagonal = jnp.diagonal(fit.precision)
    diagonal = jnp.where(diagonal > 0, diagonal, 1)
    inlier_residuals = _pool(fit.residuals**2 / diagonal[:, None] / scale[None])
    outlier_residuals = _pool(fit.distance**2 / fit.variance[:, None] / scale[None])
    residual = jnp.where(fit.inliers, inlier_residuals, jnp.where(outliers, outlier_residuals, 0))

    node_residual = jnp.where(fit.inliers, _pool(node_square / scale[None]), residual)
    is_neighbour = problem.neighbours < len(outliers)
    neighbour_median = _quantile(jnp.append(node_residual, 0)[problem.neighbours], is_neighbour, 0.5)
    typical = jnp.maximum(jnp.maximum(_quantile(node_residual, fit.inliers, 0.5), 1), neighbour_median)
    median, quantile = _quantiles(node_residual / typical, fit.inliers, (0.5, QUANTILE))
    deviation = (quantile - median) / NORMAL_QUANTILE
    return residual / (typical * jnp.maximum(median + NUM_DEVIATIONS * deviation, threshold))


def _solve(matrix, columns):
    """Solves systems with a symmetric positive definite matrix."""
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix, lower=True), columns)


def _invert_3x3(matrices):
    """Inverts symmetric 3 x 3 matrices, shape (..., 3, 3), by cross products, which compile fast."""
    a, b, c = (matrices[..., i, :] for i in range(3))
    adjugate = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)], axis=-2)
    return adjugate / jnp.sum(a * adjugate[..., 0, :], axis=-1)[..., None, None]


def _argmin(values):
    """Finds the index of the least value."""
    # In float32: with x64 off the reduction of wider numbers is lowered for narrow ones.
    return jax.lax.argmin(values.astype(jnp.float32), 0, jnp.int32)


def _pool(squares):
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
