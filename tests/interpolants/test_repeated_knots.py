"""Knots at one place: the same curve as through distinct knots with averaged data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode.interpolants import Spline
from jaxcode.interpolants.spline import spline_matrix

from .cases import INTERPOLANTS, each_interpolant, each_way, matrix

SITES = np.array([-1.0, -0.6, -0.1, 0.3, 0.35, 0.8, 1.0])
COPIES = np.array([2, 1, 3, 1, 1, 1, 2])
KNOTS = np.repeat(SITES, COPIES)
# Further copies of a site stand 1e-13 spans beside it, less than what tells two sites apart.
NEARLY = KNOTS + 2e-13 * np.concatenate([np.arange(count) for count in COPIES])
POINTS = np.sort(np.concatenate([np.linspace(-0.95, 0.97, 5), SITES[[0, 2, 4]]]))
SITE = np.repeat(np.arange(len(SITES)), COPIES)
N = len(KNOTS)
MASKS = {
    "all": np.ones(N, bool),
    "no site lost": ~np.isin(np.arange(N), [0, 4, 10]),
    "sites lost": ~np.isin(np.arange(N), [2, 3, 4, 5, 9]),
    "two sites": np.isin(np.arange(N), [3, 4, 10]),
    "one site": np.isin(np.arange(N), [3, 5]),
}
each_mask = pytest.mark.parametrize("mask", MASKS)


def averages(returned):
    """The matrix from data at the knots to means at the sites with data, and how many data each mean has."""
    member = (np.arange(len(SITES))[:, None] == SITE) & returned
    count = member.sum(axis=1)
    return (member / np.maximum(count, 1)[:, None])[count > 0], count[count > 0]


def expected_matrix(interpolant, returned):
    average, count = averages(returned)
    sites = SITES[np.unique(SITE[returned])]
    if len(sites) == 1:
        return np.tile(average, (len(POINTS), 1))
    if isinstance(interpolant, Spline):
        # The penalty stands beside the sum over all data, so a site counts as often as it has data.
        total = interpolant.smoothing * returned.sum()
        return np.asarray(spline_matrix(sites, POINTS, smoothing=total, weights=np.float64(count))) @ average
    return np.asarray(interpolant.linop(sites, POINTS).matrix()) @ average


@each_interpolant
@each_mask
@each_way
@pytest.mark.parametrize("knots", [KNOTS, NEARLY], ids=["equal", "nearly equal"])
def test_it_is_the_curve_through_the_means(name, mask, way, knots):
    interpolant, returned = INTERPOLANTS[name], MASKS[mask]
    with jax.enable_x64(True):
        expected = expected_matrix(interpolant, returned)
        found = matrix(interpolant, knots, POINTS, returned, way)
    tolerance = 1e-11 if knots is KNOTS else 1e-9
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).sum(axis=1).max())
    assert not found[:, ~returned].any()


@each_interpolant
@pytest.mark.parametrize("x64", [pytest.param(False, marks=pytest.mark.long), True])
def test_gradients_are_finite(name, x64):
    interpolant = INTERPOLANTS[name]

    def loss(knots, points, returned):
        return jnp.sum(interpolant.linop(knots, points, returned).matrix() ** 2)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    with jax.enable_x64(x64):
        for mask, returned in MASKS.items():
            for slope in gradient(KNOTS, POINTS, returned):
                assert np.isfinite(slope).all(), mask


@each_interpolant
@each_way
def test_data_at_one_place_only(name, way):
    """All knots equal: there is no span to measure in, and no curve but a constant."""
    found = matrix(INTERPOLANTS[name], np.full(N, 0.5), POINTS, np.arange(N) < 3, way)
    np.testing.assert_allclose(found, np.tile(np.where(np.arange(N) < 3, 1 / 3, 0), (len(POINTS), 1)), atol=1e-6)
