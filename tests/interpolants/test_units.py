"""Knots far from zero and in any unit: differences decide the curve, so neither may cost digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode.interpolants import Spline

from .cases import INTERPOLANTS, KNOTS, MASKS, POINTS, each_interpolant, each_way, matrix
from .spline.cases import worst_error
from .spline.reference import exact_spline

OFFSETS = [1e3, 1e6, 1.7e9, 1e12]
SCALES = [1e-100, 1e-12, 1e-3, 1e7, 1e100]
RETURNED = MASKS["some"]


@pytest.mark.parametrize("smoothing", [0.0, 1e-3])
@pytest.mark.parametrize("way", ["host", "traced mask", "all traced"])
@pytest.mark.parametrize(
    ("offset", "scale"), [*[(offset, 1.0) for offset in OFFSETS], *[(0.0, scale) for scale in SCALES], (1e112, 1e100)]
)
def test_splines_keep_their_digits(offset, scale, smoothing, way):
    knots, points = offset + scale * KNOTS, offset + scale * POINTS
    data = np.random.default_rng(3).normal(size=(len(knots), 2))
    count = RETURNED.sum()
    with jax.enable_x64(True):
        results = matrix(Spline(smoothing * scale**3), knots, points, RETURNED, way) @ data
    # The reference sees the same knots, rounded as they are far from zero, in exact arithmetic.
    expected = exact_spline(knots[RETURNED], data[RETURNED], points, count * (smoothing * scale**3), digits=150)
    assert worst_error(results, expected) < 1e-11


@pytest.mark.parametrize("smoothing", [0.0, 1e-3])
@pytest.mark.parametrize("scale", SCALES)
def test_static_places_in_any_unit_keep_their_digits_with_x64_off(scale, smoothing):
    """A smoothing in the unit cubed is outside float32's range, and so are the places."""
    for way in ("host", "traced mask"):
        found = matrix(Spline(smoothing * scale**3), scale * KNOTS, scale * POINTS, RETURNED, way)
        np.testing.assert_allclose(found, matrix(Spline(smoothing), KNOTS, POINTS, RETURNED, way), atol=1e-6)


@each_interpolant
@each_way
@pytest.mark.parametrize(("offset", "scale"), [(2.0**40, 1.0), (-(2.0**40), 1.0), (0.0, 2.0**-330), (0.0, 2.0**330)])
def test_every_interpolant_gives_the_same_matrix_in_any_unit(name, way, offset, scale):
    """Knots are rounded so that the change of unit is exact; smoothing counts in the unit cubed."""
    knots, points = (np.round(places * 2.0**10) / 2.0**10 for places in (KNOTS, POINTS))
    interpolant = INTERPOLANTS[name]
    scaled = Spline(interpolant.smoothing * scale**3) if isinstance(interpolant, Spline) else interpolant
    with jax.enable_x64(True):
        expected = matrix(interpolant, knots, points, RETURNED, way)
        found = matrix(scaled, offset + scale * knots, offset + scale * points, RETURNED, way)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).sum(axis=1).max())


@each_interpolant
@pytest.mark.parametrize("scale", [pytest.param(2.0**-200, marks=pytest.mark.long), 2.0**200])
def test_derivatives_with_respect_to_places_follow_the_unit(name, scale):
    interpolant = INTERPOLANTS[name]
    scaled = Spline(interpolant.smoothing * scale**3) if isinstance(interpolant, Spline) else interpolant
    cotangent = np.random.default_rng(4).normal(size=(len(POINTS), len(KNOTS)))

    def gradients(interpolant, unit):
        def loss(knots, points):
            return jnp.sum(cotangent * interpolant.linop(knots, points, jnp.asarray(RETURNED)).matrix())

        return [unit * np.asarray(g) for g in jax.jit(jax.grad(loss, (0, 1)))(unit * KNOTS, unit * POINTS)]

    with jax.enable_x64(True):
        for found, expected in zip(gradients(scaled, scale), gradients(interpolant, 1.0), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
