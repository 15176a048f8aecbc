"""The table that the tests of interpolants share: every interpolant, knots, masks, and how the mask is given."""

import functools

import jax
import numpy as np
import pytest

from jaxcode.interpolants import Berrut, FloaterHormann, NotAKnot, Polynomial, Spline

from .linear import Linear

NUM_KNOTS = 9
INTERPOLANTS = {
    "spline": Spline(),
    "smoothing spline": Spline(1e-3),
    "Berrut": Berrut(),
    "Floater-Hormann 3": FloaterHormann(3),
    "polynomial": Polynomial(),
    "polynomial of degree 3": Polynomial(3),
    "not-a-knot": NotAKnot(),
    "linear, written outside": Linear(),
}
KNOTS = np.sort(np.random.default_rng(0).uniform(-1, 1, NUM_KNOTS))
POINTS = np.sort(np.concatenate([np.random.default_rng(1).uniform(-0.7, 0.9, 5), KNOTS[[0, 4]]]))
INDEX = np.arange(NUM_KNOTS)
MASKS = {
    "all": np.ones(NUM_KNOTS, bool),
    "some": INDEX % 3 != 1,
    "ends missing": (INDEX > 1) & (INDEX < NUM_KNOTS - 1),
    "two": np.isin(INDEX, [3, 4]),
}

each_interpolant = pytest.mark.parametrize("name", INTERPOLANTS)
each_mask = pytest.mark.parametrize("mask", MASKS)
# Whether the host knows the mask, or knots and points too, or the program is given all of them.
each_way = pytest.mark.parametrize("way", ["host", "traced mask", "all traced"])


def matrix(interpolant, knots, points, returned, way):
    """Forms the matrix, with x64 on or off, of what is known to the host or traced."""
    if way == "host":
        return np.asarray(interpolant.linop(knots, points, returned).matrix())
    if way == "traced mask":
        return np.asarray(_compiled_for_mask(interpolant, knots.tobytes(), points.tobytes())(returned))
    return np.asarray(_compiled(interpolant)(knots, points, returned))


@functools.cache
def _compiled(interpolant):
    return jax.jit(lambda *arguments: interpolant.linop(*arguments).matrix())


@functools.cache
def _compiled_for_mask(interpolant, knots, points):
    knots, points = np.frombuffer(knots), np.frombuffer(points)
    return jax.jit(lambda returned: interpolant.linop(knots, points, returned).matrix())
