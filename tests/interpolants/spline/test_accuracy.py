"""Values against oracles, over knots, smoothings and masks; the full table is `python -m tests.benchmarks.accuracy`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import make_smoothing_spline

from jaxcode.interpolants.spline import fit_and_evaluate

from . import cases
from .measure import error_limit, errors
from .reference import exact_spline, scipy_spline


@pytest.mark.parametrize("layout", ["chebyshev", "random"])
@pytest.mark.parametrize(
    "n", [2, 3, pytest.param(4, marks=pytest.mark.long), 5, pytest.param(8, marks=pytest.mark.long), 20]
)
def test_every_mask_and_smoothing_of_few_knots(n, layout):
    for smoothing in cases.SMOOTHINGS:
        for mask, found in errors(n, layout, smoothing):
            for program, error in found.items():
                assert error <= error_limit(program), (smoothing, mask, program, error)


@pytest.mark.parametrize(
    ("n", "layout", "smoothing"),
    [
        (100, "chebyshev", 0.0),
        (100, "random", 1e-9),
        (100, "chebyshev", 1e-2),
        (100, "random", 100.0),
        pytest.param(512, "chebyshev", 1e-9, marks=pytest.mark.long),
        pytest.param(4096, "chebyshev", 0.0, marks=pytest.mark.long),
    ],
)
def test_every_mask_of_many_knots(n, layout, smoothing):
    for mask, found in errors(n, layout, smoothing):
        for program, error in found.items():
            assert error <= error_limit(program), (mask, program, error)


def test_the_two_oracles_agree_where_scipy_is_used():
    rng = np.random.default_rng(3)
    for n, smoothing in [(5, 0.0), (20, 1e-3), (100, 1e-6)]:
        t = cases.knots("random", n, rng)
        y, p = cases.data(t, rng), cases.points(t, rng)
        assert cases.worst_error(scipy_spline(t, y, p, smoothing), exact_spline(t, y, p, smoothing)) < 1e-10


def test_scipy_loses_its_digits_where_the_exact_oracle_takes_over():
    # Without this, a reader would ask why the oracle is not SciPy everywhere.
    rng = np.random.default_rng(4)
    t = cases.knots("chebyshev", 512, rng)
    y = cases.data(t, rng)
    scipy_error = cases.worst_error(make_smoothing_spline(t, y, lam=100.0)(t[:9]), exact_spline(t, y, t[:9], 100.0))
    assert scipy_error > 1e-9


def test_close_knots_near_zero_keep_their_digits():
    """Their gaps are far smaller than the rounding of numbers as large as the knots' span."""
    t = np.concatenate([[-1.0, -0.5], 1e-9 * np.array([1.0, 1.25, 1.75]), [0.4, 1.0]])
    y = np.sin(np.arange(7.0))[:, None] * np.where(np.abs(t) < 0.1, 1e-9, 1)[:, None]
    p = np.array([-0.7, 1.1e-9, 1.5e-9, 0.3])
    traced_mask = jax.jit(lambda mask, mu: fit_and_evaluate(t, y, p, smoothing=mu, returned=mask))
    all_traced = jax.jit(lambda mask, mu, t, p: fit_and_evaluate(t, y, p, smoothing=mu, returned=mask))
    for smoothing in (0.0, 1e-20):
        expected = exact_spline(t, y, p, smoothing)
        with jax.enable_x64(True):
            y, mask = jnp.asarray(y), np.ones(7, bool)
            for found in (traced_mask(mask, smoothing), all_traced(mask, smoothing, t, p)):
                np.testing.assert_allclose(found, expected, rtol=1e-13)
            # LAPACK's pivots lose some of them.
            np.testing.assert_allclose(fit_and_evaluate(t, y, p, smoothing=smoothing), expected, rtol=2e-6)
