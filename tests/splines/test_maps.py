"""One spline, three ways to prepare it: on the host, traced as a matrix, traced in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode._maps import apply_plainly
from jaxcode.splines import maps
from jaxcode.splines.banded import banded_matrix

from . import cases

RNG = np.random.default_rng(5)
LAYOUTS = {
    "apart": np.sort(RNG.uniform(-1, 1, 23)),
    "in threes": np.repeat(np.linspace(-1, 1, 8), 3)[:23],
    "in runs longer than a block": np.repeat([-1.0, -0.3, 0.2, 1.0], [2, 9, 1, 11]),
    "all but one at one place": np.array([-1.0, *[0.5] * 22]),
}
POINTS = np.sort(np.concatenate([RNG.uniform(-1.4, 1.4, 9), [-1.0, 0.5, 1.0]]))
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(params=[3, 8, None], ids=["blocks of three", "blocks of eight", "one matrix"])
def form(request, monkeypatch):
    """How the traced program is cut."""
    if request.param is not None:
        monkeypatch.setattr(maps, "MOST_IN_ONE_MATRIX", 0)
        monkeypatch.setattr(maps, "ENTRIES_IN_A_BLOCK", request.param)
    return request.param


@each_layout
@pytest.mark.parametrize("nodes", ["known", "traced"])
def test_every_way_gives_the_same_matrix(form, layout, nodes):
    knots = LAYOUTS[layout]
    weights = RNG.uniform(0.5, 2, 23)
    with jax.enable_x64(True):

        @jax.jit
        def traced(knots_now, points_now, weights, smoothing):
            at = (knots, POINTS) if nodes == "known" else (knots_now, points_now)
            return maps.spline_map(*at, smoothing, weights).matrix()

        for name, mask in cases.masks(23, RNG).items():
            for smoothing in (0.0, 1e-4, 10.0):
                expected = banded_matrix(knots, POINTS, mask * weights, smoothing)
                found = np.asarray(traced(knots, POINTS, mask * weights, smoothing))
                scale = np.abs(expected).sum(axis=1).max()
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * scale, err_msg=f"{name}, {smoothing}")


def test_blocks_have_the_gradients_of_the_matrix():
    knots, mask = LAYOUTS["in runs longer than a block"], np.arange(23) % 4 != 1
    values, pull = RNG.normal(size=(23, 2)), RNG.normal(size=(12, 2))

    def gradients():
        def loss(smoothing, knots, points, weights, values):
            return jnp.sum(pull * apply_plainly(maps.spline_map(knots, points, smoothing, weights), values))

        return jax.jit(jax.grad(loss, range(5)))(1e-2, knots, POINTS, mask * 1.0, values)

    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        expected = gradients()
        patch.setattr(maps, "MOST_IN_ONE_MATRIX", 0)
        patch.setattr(maps, "ENTRIES_IN_A_BLOCK", 5)
        found = gradients()
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8 * np.abs(other).max())


@pytest.mark.parametrize("count", [0, 1])
def test_every_way_gives_nan_for_fewer_than_two_answers(form, count):
    weights = (np.arange(23) < count) * 1.0
    knots = LAYOUTS["apart"]
    assert np.isnan(banded_matrix(knots, POINTS, weights, 0.0)).all()
    assert np.isnan(jax.jit(lambda w: maps.spline_map(knots, POINTS, 0.0, w).matrix())(weights)).all()
