"""One spline, three ways to prepare it: on the host, traced as a matrix, traced in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode.interpolants.spline import linop
from jaxcode.interpolants.spline.host import host_spline_matrix
from jaxcode.linops.abstract import apply_in_one_pass

from . import cases
from .reference import exact_spline

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
        monkeypatch.setattr(linop, "MAX_ENTRIES_IN_MATRIX", 0)
        monkeypatch.setattr(linop, "ENTRIES_PER_BLOCK", request.param)
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
            return linop.spline_linop(*at, smoothing, weights).matrix()

        for name, mask in cases.masks(23, RNG).items():
            for smoothing in (0.0, 1e-4, 10.0):
                expected = host_spline_matrix(knots, POINTS, mask * weights, smoothing)
                found = np.asarray(traced(knots, POINTS, mask * weights, smoothing))
                scale = np.abs(expected).sum(axis=1).max()
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * scale, err_msg=f"{name}, {smoothing}")


def test_blocks_have_the_gradients_of_the_matrix():
    knots, mask = LAYOUTS["in runs longer than a block"], np.arange(23) % 4 != 1
    values, pull = RNG.normal(size=(23, 2)), RNG.normal(size=(12, 2))

    def gradients():
        def loss(smoothing, knots, points, weights, values):
            return jnp.sum(pull * apply_in_one_pass(linop.spline_linop(knots, points, smoothing, weights), values))

        return jax.jit(jax.grad(loss, range(5)))(1e-2, knots, POINTS, mask * 1.0, values)

    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        expected = gradients()
        patch.setattr(linop, "MAX_ENTRIES_IN_MATRIX", 0)
        patch.setattr(linop, "ENTRIES_PER_BLOCK", 5)
        found = gradients()
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8 * np.abs(other).max())


@pytest.mark.parametrize("count", [0, 1])
def test_every_way_gives_nan_for_fewer_than_two_answers(form, count):
    weights = (np.arange(23) < count) * 1.0
    knots = LAYOUTS["apart"]
    assert np.isnan(host_spline_matrix(knots, POINTS, weights, 0.0)).all()
    assert np.isnan(jax.jit(lambda w: linop.spline_linop(knots, POINTS, 0.0, w).matrix())(weights)).all()


@pytest.mark.parametrize("span", [1e-9, 1e7, 1e12])
@pytest.mark.parametrize("missing", [0, 3], ids=["all", "three missing"])
def test_the_unit_of_knots_costs_no_digits(span, missing):
    mask = np.arange(30) >= missing
    for mu in (1e-6, 1.0, 100.0):
        at = np.linspace(0, 1, 30), np.linspace(0.1, 0.9, 7)
        expected = linop.spline_linop(*at, mu, mask).matrix()
        found = linop.spline_linop(span * at[0], span * at[1], mu * span**3, mask).matrix()
        np.testing.assert_allclose(found, expected, atol=1e-6)
        values = RNG.normal(size=(30, 1))
        with jax.enable_x64(True):
            results = linop.spline_linop(span * at[0], span * at[1], mu * span**3, mask).product(jnp.asarray(values))
        truth = exact_spline(span * at[0][mask], values[mask], span * at[1], mu * span**3)
        assert cases.worst_error(results, truth) < 1e-9
