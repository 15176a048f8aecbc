"""Gaussian processes: against scikit-learn and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor, kernels

from jaxcode.interpolants.kernel import JITTER, Process, Sites, fit_process, posterior, spread_of

RNG = np.random.default_rng(0)
PLACES, POINTS = RNG.normal(size=(14, 3)), RNG.normal(size=(6, 3))
VALUES = np.sin(PLACES @ RNG.normal(size=(3, 2)))
LIVE = np.arange(14) % 5 != 2


def sites(places, first_label=0):
    return Sites(places, np.arange(first_label, first_label + len(places)))


def process(smoothness, length, nugget=0.0):
    return Process(*(jnp.asarray(value, jnp.float64) for value in (smoothness, length, nugget)))


def values_of(*arguments):
    return jax.tree.map(np.asarray, posterior(*arguments))


def covariance(smoothness, length, a, b):
    return kernels.Matern(length, nu=smoothness)(a, b)


@pytest.mark.parametrize("smoothness", [0.5, 2.5, 4.5, 6.5])
@pytest.mark.parametrize("nugget", [0.0, 0.3])
def test_agrees_with_scikit_learn_without_a_mean(smoothness, nugget):
    with jax.enable_x64(True):
        weights, variance = values_of(process(smoothness, 1.3, nugget), sites(PLACES), sites(POINTS, 100), LIVE, 0.0)
    kernel = kernels.Matern(1.3, nu=smoothness)
    oracle = GaussianProcessRegressor(kernel, alpha=nugget + JITTER, optimizer=None).fit(PLACES[LIVE], VALUES[LIVE])
    mean, deviation = oracle.predict(POINTS, return_std=True)
    np.testing.assert_allclose(weights @ np.where(LIVE[:, None], VALUES, 0), mean, atol=1e-8)
    # The share without correlation is part of the value at a point, which scikit-learn takes for noise.
    np.testing.assert_allclose(variance - nugget, deviation[:, 0] ** 2, atol=1e-8)
    assert (weights[:, ~LIVE] == 0).all()


def test_an_unknown_mean_is_one_of_large_variance():
    with jax.enable_x64(True):
        weights, variance = values_of(process(2.5, 0.8), sites(PLACES), sites(POINTS, 100), LIVE, 1.0)
    large = 1e7
    k = covariance(2.5, 0.8, PLACES[LIVE], PLACES[LIVE]) + JITTER * np.eye(LIVE.sum()) + large
    cross = covariance(2.5, 0.8, POINTS, PLACES[LIVE]) + large
    np.testing.assert_allclose(weights[:, LIVE], np.linalg.solve(k, cross.T).T, atol=1e-6)
    expected = 1 + large - np.sum(cross * np.linalg.solve(k, cross.T).T, axis=1)
    np.testing.assert_allclose(variance, expected, atol=1e-6)
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, atol=1e-9)


def test_the_process_chosen_is_the_most_likely_one():
    places, values = RNG.normal(size=(2, 12, 2)), RNG.normal(size=(2, 12, 1)).cumsum(axis=1)
    live = np.arange(24).reshape(2, 12) % 7 != 0
    stacked = Sites(places, np.tile(np.arange(12), (2, 1)))
    with jax.enable_x64(True):
        chosen, variance = fit_process(stacked, live, values, 1.0)
        extent = float(spread_of(jnp.asarray(places)))

    def log_likelihood(smoothness, length, nugget):
        """The density of differences from the mean, maximised over the variance."""
        square = determinant = count = 0
        for x, y, mask in zip(places, values, live, strict=True):
            n = mask.sum()
            contrasts = np.linalg.svd(np.ones((1, n)))[2][1:]
            k = covariance(smoothness, length, x[mask], x[mask]) + (nugget + JITTER) * np.eye(n)
            k = contrasts @ k @ contrasts.T
            r = contrasts @ y[mask, 0]
            square += r @ np.linalg.solve(k, r)
            determinant += np.linalg.slogdet(k)[1]
            count += n - 1
        return -0.5 * (count * np.log(square / count) + determinant), square / count

    found = [float(leaf) for leaf in (chosen.smoothness, chosen.length, chosen.nugget)]
    best, expected_variance = log_likelihood(found[0], *found[1:])
    np.testing.assert_allclose(float(variance[0]), expected_variance, rtol=1e-6)
    for smoothness in (2.5, 4.5, 6.5):
        for length in np.geomspace(0.05, 3.0, 8) * extent:
            for nugget in (0.0, 0.1, 1.0, 10.0):
                assert log_likelihood(smoothness, length, nugget)[0] <= best + 1e-6


def test_residuals_that_say_nothing_are_shrunk_to_nothing():
    noise = RNG.normal(size=(1, 60, 1))
    stacked = Sites(RNG.normal(size=(1, 60, 2)), np.arange(60)[None])
    with jax.enable_x64(True):
        chosen, _ = fit_process(stacked, np.ones((1, 60), bool), noise, 0.0)
        weights, _ = values_of(chosen, sites(stacked.features[0]), sites(POINTS[:, :2], 100), np.ones(60, bool), 0.0)
    assert np.mean(np.square(weights @ noise[0])) < 0.02


def test_a_site_with_a_value_has_that_value():
    labels = np.array([0, 1, 1, 2])
    with jax.enable_x64(True):
        own = Sites(PLACES[[0, 1, 1, 2]], labels)
        points = Sites(PLACES[[1, 2]], np.array([1, 2]))
        weights, variance = values_of(process(4.5, 1.0, 1.0), own, points, np.array([True, False, True, False]), 1.0)
    np.testing.assert_array_equal(weights[0], [0, 0, 1, 0])
    assert variance[0] == 0 < variance[1]
