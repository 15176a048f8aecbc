"""One spline, three ways to prepare it: on the host, traced as a matrix, traced in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import nodes
from jaxcode._float64 import halve
from jaxcode._maps import Matrix, apply_plainly
from jaxcode.splines import maps
from jaxcode.splines.banded import banded_matrix
from jaxcode.splines.downdate import downdated_matrix

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


@pytest.mark.parametrize("smoothing", [0.0, 1e-9, 1e-5, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("layout", ["chebyshev", "even", "drawn", "systematic"])
def test_filling_in_what_is_missing_gives_the_same_matrix(layout, smoothing):
    rng = np.random.default_rng(7)
    used = 0
    for n in (3, 10, 30, 100):
        points = nodes.chebyshev_first(max(2, n // 5))
        # Each up to 4.8 times as wide as the next, and up to 97 times as wide as any.
        gaps = np.exp(np.clip(np.cumsum(rng.uniform(-1.57, 1.57, n - 1)), -2.29, 2.29))
        knots = {
            "chebyshev": nodes.chebyshev_second(n),
            "even": np.linspace(-1, 1, n),
            "drawn": np.concatenate([[-1], 2 * np.cumsum(gaps) / gaps.sum() - 1]),
            "systematic": nodes.systematic(points, n),
        }[layout]
        for share in (0.02, 0.1, 0.3, 0.45):
            for start in (None, None, 0, n // 2):
                mask, missing = np.ones(n, bool), max(1, int(share * n))
                mask[rng.permutation(n)[:missing] if start is None else slice(start, start + missing)] = False
                found = downdated_matrix(knots, points, mask, smoothing)
                if found is not None:
                    expected = banded_matrix(knots, points, mask * 1.0, smoothing)
                    scale = np.abs(expected).sum(axis=1).max()
                    bar = 1e-9 if layout == "drawn" else 2e-11
                    np.testing.assert_allclose(found, expected, rtol=0, atol=bar * scale)
                    assert not np.asarray(Matrix(halve(found), mask).matrix())[:, ~mask].any()
                    used += 1
    assert used >= 40


@pytest.mark.parametrize(
    ("knots", "missing"),
    [
        (np.linspace(-1, 1, 30), slice(0, 0)),
        (np.linspace(-1, 1, 30), slice(10, 19)),
        (np.linspace(-1, 1, 30), slice(None, None, 2)),
        (np.linspace(-1, 1, 200), slice(3, 4)),
        (np.repeat(np.linspace(-1, 1, 15), 2), slice(3, 4)),
        (np.linspace(-1, 1, 30) ** 5, slice(3, 4)),
        (np.delete(np.linspace(-1, 1, 40), np.s_[3:12]), slice(3, 4)),
        (np.cumsum(1.5 ** np.abs(np.arange(30) - 15)), slice(3, 4)),
        (np.array([-1.0, 1.0]), slice(0, 1)),
    ],
    ids=[
        "none missing",
        "a long run",
        "half",
        "many knots",
        "knots at one place",
        "uneven knots",
        "a wide gap",
        "knots closer and closer",
        "all but one",
    ],
)
def test_what_cannot_be_filled_in_well_is_not(knots, missing):
    mask = np.ones(len(knots), bool)
    mask[missing] = False
    assert downdated_matrix(knots, POINTS, mask, 0.0) is None
    matrix = maps.spline_map(knots, POINTS, 0.0, mask).matrix()
    np.testing.assert_allclose(matrix, banded_matrix(knots, POINTS, mask * 1.0, 0.0), atol=1e-6)


@pytest.mark.parametrize("span", [1e-9, 1e7, 1e12])
@pytest.mark.parametrize("missing", [0, 3], ids=["all", "three missing"])
def test_the_unit_of_knots_costs_no_digits(span, missing):
    mask = np.arange(30) >= missing
    for mu in (1e-6, 1.0, 100.0):
        at = np.linspace(0, 1, 30), np.linspace(0.1, 0.9, 7)
        expected = maps.spline_map(*at, mu, mask).matrix()
        found = maps.spline_map(span * at[0], span * at[1], mu * span**3, mask).matrix()
        np.testing.assert_allclose(found, expected, atol=1e-6)
        values = RNG.normal(size=(30, 1))
        with jax.enable_x64(True):
            results = maps.spline_map(span * at[0], span * at[1], mu * span**3, mask).product(jnp.asarray(values))
        truth = exact_spline(span * at[0][mask], values[mask], span * at[1], mu * span**3)
        assert cases.worst_error(results, truth) < 1e-9
