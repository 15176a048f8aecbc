"""Posteriors of integrated Wiener processes against brute force with 150 digits, and against SciPy's splines."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy.interpolate import make_interp_spline

from jaxcode.interpolants.spline import wiener
from jaxcode.interpolants.spline.sites import find_sites

RNG = np.random.default_rng(0)
KNOTS = np.sort(RNG.uniform(-1, 1, 10))
KNOTS[4] = KNOTS[5]
POINTS = np.sort(np.append(RNG.uniform(-1.1, 1.1, 5), KNOTS[7]))
WEIGHTS = np.array([1, 2, 0, 1, 1, 3, 1, 1, 1, 0.5])
SITES = np.unique(KNOTS[WEIGHTS > 0])


@pytest.mark.parametrize("smoothing", [0.0, 1e-3, 1.0])
def test_unit_variances_are_a_brute_force_gaussian_process(smoothing):
    with jax.enable_x64(True):
        ours = wiener.unit_variances(KNOTS, POINTS, WEIGHTS, smoothing)
    _, theirs = _gaussian_process(KNOTS[WEIGHTS > 0], WEIGHTS[WEIGHTS > 0], POINTS, smoothing)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("scale", [1e-90, 1e-6, 1e6, 1e90])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_unit_variances_have_the_cubed_unit_of_the_knots(scale, offset):
    with jax.enable_x64(True):
        expected = wiener.unit_variances(KNOTS, POINTS, WEIGHTS, 1e-3)
        moved = wiener.unit_variances(
            scale * (KNOTS + offset), scale * (POINTS + offset), WEIGHTS, 1e-3 * scale * scale * scale
        )
    np.testing.assert_allclose(np.asarray(moved) / scale / scale / scale, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("order", "share", "smoothing"), [(1, 0, 0), (2, 0, 0), (2, 0, 1e-3), (4, 0, 0), (4, 0.9, 0)])
def test_posteriors_are_brute_force_gaussian_processes_at_points_and_left_out_sites(order, share, smoothing):
    # The results must not depend on the other process.
    found = _posteriors(POINTS, [3, order], [0.5, share], [0.1, smoothing])
    rows, variance = (np.asarray(a[1]) for a in (found.means, found.variances))
    n, p, noise = len(SITES), len(POINTS), float(smoothing)
    weights = np.array([WEIGHTS[(t == KNOTS) & (WEIGHTS > 0)].sum() for t in SITES])
    means, variances = _gaussian_process(SITES, weights, POINTS, noise, order, share)
    np.testing.assert_allclose(rows[:p, :n], means, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(variance[:p], variances, rtol=1e-7, atol=1e-15)
    assert (rows[:p, n:] == 0).all()
    for i in range(n):
        others = np.arange(n) != i
        means, variances = _gaussian_process(SITES[others], weights[others], SITES[[i]], noise, order, share)
        np.testing.assert_allclose(rows[p + i, :n][others], means[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(rows[p + i, i], 0, atol=1e-9)
        np.testing.assert_allclose(variance[p + i], variances[0] + noise / weights[i], rtol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_posterior_means_are_scipys_natural_splines(order):
    inside = np.linspace(SITES[0], SITES[-1], 7)
    y = np.sin(3 * SITES)
    ends = [(order + i, 0.0) for i in range(order - 1)]
    theirs = make_interp_spline(SITES, y, k=2 * order - 1, bc_type=(ends, ends) if ends else None)(inside)
    rows = np.asarray(_posteriors(inside, [order], [0.0], [0.0]).means)
    np.testing.assert_allclose(rows[0, : len(inside), : len(SITES)] @ y, theirs, atol=1e-9)


@pytest.mark.parametrize("num_missing", [0, 2])
def test_the_precision_of_data_is_that_of_noisy_data_and_noise_of_varying_intensity(num_missing):
    """Against the covariance inverted with straight lines projected out, every datum with noise of its own."""
    noise_precision = np.where(np.arange(10) < num_missing, 0, RNG.uniform(1, 100, 10))

    def intensity(s):
        return 2 + s + s**2

    def precision(knots, weights):
        sites = find_sites(knots, weights)
        noise = wiener.form_uniform_noise(sites.place, 3)
        noise = noise._replace(variance=noise.variance * intensity(noise.abscissa)[None])
        innovations = wiener.compute_innovations(sites, jnp.zeros(0), np.array([2]), noise)
        posteriors = wiener.compute_posteriors(sites, innovations, jnp.ones(1), 2)
        return wiener.compute_data_precision(sites, posteriors.precision[0], weights)

    with jax.enable_x64(True):
        found = np.asarray(jax.jit(precision)(jnp.asarray(KNOTS), jnp.asarray(noise_precision)))
    live = noise_precision > 0
    t = KNOTS[live]
    node, weight = np.polynomial.legendre.leggauss(4)
    length = np.minimum(t[:, None], t) - t[0]
    s = t[0] + length[..., None] * (node + 1) / 2
    responses = (t[:, None, None] - s) * (t[None, :, None] - s) * intensity(s)
    covariance = length / 2 * (responses @ weight) + np.diag(1 / noise_precision[live])
    line = np.stack([np.ones_like(t), t], axis=1)
    inverse = np.linalg.inv(covariance)
    expected = inverse - inverse @ line @ np.linalg.solve(line.T @ inverse @ line, line.T @ inverse)
    np.testing.assert_allclose(found[np.ix_(live, live)], expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    assert (found[~live] == 0).all()


def _posteriors(points, orders, shares, smoothing):
    def compute(knots, points, weights):
        sites = find_sites(knots, weights)
        noise = wiener.form_jump_noise(
            jnp.concatenate([sites.place, points]), points, num_abscissae=max(orders), shares=np.array(shares)
        )
        innovations = wiener.compute_innovations(sites, points, np.array(orders), noise)
        return wiener.compute_posteriors(sites, innovations, jnp.array(smoothing), max(orders))

    with jax.enable_x64(True):
        return jax.jit(compute)(jnp.asarray(KNOTS), jnp.asarray(points), jnp.asarray(WEIGHTS))


def _gaussian_process(knots, weights, points, smoothing, order=2, jump_share=0.0):
    """Posterior means and variances with 150 digits: integrals from -2 on, with a vague prior on the start."""
    ends = 2 * POINTS[0] - POINTS[1], 2 * POINTS[-1] - POINTS[-2]
    jump_variances = np.convolve(np.concatenate([ends[:1], POINTS, ends[1:]]), [0.5, 0, -0.5], "valid")
    with mpmath.workdps(150):

        def covariance(s, t):
            s, t = mpmath.mpf(float(s)) + 2, mpmath.mpf(float(t)) + 2
            low, distance = min(s, t), abs(s - t)
            terms = (
                mpmath.binomial(order - 1, j) * distance ** (order - 1 - j) * low ** (order + j) / (order + j)
                for j in range(order)
            )
            uniform = sum(terms)
            jumps = 0
            for place, share in zip(POINTS, jump_variances, strict=True):
                jump = mpmath.mpf(float(place)) + 2
                if jump < low:
                    jumps += mpmath.mpf(float(share)) * ((s - jump) * (t - jump)) ** (order - 1)
            process = (1 - mpmath.mpf(jump_share)) * uniform + mpmath.mpf(jump_share) * jumps
            return process / mpmath.factorial(order - 1) ** 2 + mpmath.mpf(10) ** 40 * sum(
                (s * t) ** j for j in range(order)
            )

        # This noise is negligible, but with it knots at one place do not make the matrix singular.
        noise = mpmath.mpf(smoothing) + mpmath.mpf(10) ** -40
        n = len(knots)
        gram = mpmath.matrix(n, n)
        for i in range(n):
            for j in range(n):
                gram[i, j] = covariance(knots[i], knots[j]) + (noise / mpmath.mpf(float(weights[i])) if i == j else 0)
        inverse = gram**-1
        means, variances = [], []
        for p in points:
            cross = mpmath.matrix([covariance(p, t) for t in knots])
            mean = cross.T * inverse
            means.append([float(mean[j]) for j in range(n)])
            variances.append(float(covariance(p, p) - (mean * cross)[0]))
    return np.array(means), np.array(variances)
