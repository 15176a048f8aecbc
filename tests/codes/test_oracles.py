"""Every code against a library that we did not write, in float64."""

import csaps
import interpax
import jax
import numpy as np
import pytest
import scipy.interpolate
from numpy.polynomial import chebyshev, polynomial

from jaxcode import LagrangeCode, SplineCode, nodes

from .cases import (
    CODES,
    MASKS,
    MERGES_SITES,
    NUM_DATA,
    NUM_WORKERS,
    decoder_matrix,
    each_mask,
    encoder_matrix,
    in_x64,
    normal,
    returned_of,
)
from .cases import LAYOUTS as TABLE_LAYOUTS

FloaterHormann = getattr(scipy.interpolate, "FloaterHormannInterpolator", None)
needs_floater_hormann = pytest.mark.skipif(FloaterHormann is None, reason="SciPy 1.15 brought Floater-Hormann")

SPLINES = [
    name for name in CODES if name.startswith("spline") and name not in MERGES_SITES and name != "spline-then-berrut"
]
RATIONAL = [name for name in CODES if name.startswith(("berrut", "floater"))]
LAYOUTS = {"chebyshev": SplineCode.chebyshev, "systematic": SplineCode.systematic}
SMOOTHINGS = [0.0, 1e-6, 1e-3, 1.0]


def natural(t, y, at):
    """SciPy's natural cubic spline, straight on beyond its ends."""
    curve = scipy.interpolate.CubicSpline(t, y, bc_type="natural")
    inside = np.clip(at, t[0], t[-1])
    return curve(inside) + curve(inside, 1) * (at - inside)[:, None]


def smoothing_spline(t, y, at, lam):
    """SciPy's smoothing spline, which needs five points, with straight lines beyond its ends."""
    if lam == 0:
        return natural(t, y, at)
    curve = scipy.interpolate.make_smoothing_spline(t, y, lam=lam)
    inside = np.clip(at, t[0], t[-1])
    return curve(inside) + curve.derivative()(inside) * (at - inside)[:, None]


def merged(t, y):
    """Distinct knots, the mean of the data at each, and how many data those are."""
    distinct, site, count = np.unique(t, return_inverse=True, return_counts=True)
    return distinct, np.stack([y[site == i].mean(axis=0) for i in range(len(distinct))]), count


def decoded(code, y, returned):
    return decoder_matrix(code, returned) @ y


def assert_close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


# ---- splines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLINES)
def test_encoder_is_scipys_spline(name):
    code, x = CODES[name], normal(NUM_DATA, 2, dtype=float)
    expected = smoothing_spline(code.nodes.data, x, code.nodes.workers, NUM_DATA * code.encoder.smoothing)
    assert_close(encoder_matrix(code) @ x, expected)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [mask for mask in MASKS if not mask.startswith("two")])
def test_decoder_is_scipys_spline_through_who_returned(layout, mask, smoothing):
    code = LAYOUTS[layout](NUM_DATA, NUM_WORKERS, decoder_smoothing=smoothing)
    returned, y = returned_of(mask, "spline-chebyshev"), normal(NUM_WORKERS, 2, dtype=float)
    t = code.nodes.workers[returned]
    expected = smoothing_spline(t, y[returned], code.nodes.data, returned.sum() * smoothing)
    assert_close(decoded(code, y, returned), expected)


@pytest.mark.parametrize("name", SPLINES)
@pytest.mark.parametrize("mask", ["two-adjacent", "two-far-apart"])
def test_two_answers_give_numpys_straight_line(name, mask):
    code, returned, y = CODES[name], returned_of(mask, name), normal(NUM_WORKERS, 2, dtype=float)
    line = polynomial.polyfit(code.nodes.workers[returned], y[returned], 1)
    assert_close(decoded(code, y, returned), polynomial.polyval(code.nodes.data, line).T)


@each_mask
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_workers_at_one_node_are_scipys_weighted_mean(mask, smoothing):
    code = SplineCode.repeated(NUM_DATA, NUM_WORKERS, decoder_smoothing=smoothing)
    returned, y = returned_of(mask, "spline-repeated"), normal(NUM_WORKERS, 2, dtype=float)
    t, mean, count = merged(code.nodes.workers[returned], y[returned])
    if len(t) < 5:
        expected = natural(t, mean, code.nodes.data)
        if smoothing and len(t) > 2:
            return  # SciPy smooths five points or more
    elif smoothing == 0:
        expected = natural(t, mean, code.nodes.data)
    else:
        curve = scipy.interpolate.make_smoothing_spline(t, mean, w=count, lam=returned.sum() * smoothing)
        expected = curve(code.nodes.data)  # all data nodes lie between the outermost workers
    assert_close(decoded(code, y, returned), expected)


@pytest.mark.parametrize("mask", ["all", "random-third-missing", "alternating"])
def test_decoder_is_csaps_between_the_answers(mask):
    """csaps minimises p sum (y - u)^2 + (1 - p) integral u''^2, so p = 1 / (1 + lambda |F|)."""
    returned, y = returned_of(mask, "spline-chebyshev"), normal(NUM_WORKERS, 2, dtype=float)
    code = SplineCode.chebyshev(NUM_DATA, NUM_WORKERS, decoder_smoothing=1e-3)
    t = code.nodes.workers[returned]
    inside = (code.nodes.data >= t[0]) & (code.nodes.data <= t[-1])
    smooth = 1 / (1 + returned.sum() * 1e-3)
    expected = csaps.csaps(t, y[returned].T, code.nodes.data[inside], smooth=smooth).T
    assert_close(decoded(code, y, returned)[inside], expected)


@pytest.mark.parametrize("mask", ["all", "random-third-missing", "alternating"])
def test_decoder_is_interpax_between_the_answers(mask):
    returned, y = returned_of(mask, "spline-chebyshev"), normal(NUM_WORKERS, 2, dtype=float)
    code = SplineCode.chebyshev(NUM_DATA, NUM_WORKERS)
    t = code.nodes.workers[returned]
    inside = (code.nodes.data >= t[0]) & (code.nodes.data <= t[-1])
    with jax.enable_x64(True):
        expected = np.asarray(interpax.CubicSpline(t, y[returned], bc_type="natural")(code.nodes.data[inside]))
    assert_close(decoded(code, y, returned)[inside], expected)


# ---- rational interpolants ---------------------------------------------------------------------------------


def rational(interpolant, t, y, at):
    degree = min(getattr(interpolant, "degree", 0), len(t) - 1)
    return FloaterHormann(t, y, d=degree)(at)


@needs_floater_hormann
@pytest.mark.parametrize("name", RATIONAL)
def test_rational_encoder_is_scipys(name):
    code, x = CODES[name], normal(NUM_DATA, 2, dtype=float)
    assert_close(encoder_matrix(code) @ x, rational(code.encoder, code.nodes.data, x, code.nodes.workers))


@needs_floater_hormann
@pytest.mark.parametrize("name", RATIONAL)
@each_mask
def test_rational_decoder_is_scipys_through_who_returned(name, mask):
    code, returned, y = CODES[name], returned_of(mask, name), normal(NUM_WORKERS, 2, dtype=float)
    t, mean, _ = merged(code.nodes.workers[returned], y[returned])
    expected = np.repeat(mean, NUM_DATA, 0) if len(t) == 1 else rational(code.decoder, t, mean, code.nodes.data)
    assert_close(decoded(code, y, returned), expected)


def test_degree_zero_is_berruts():
    np.testing.assert_array_equal(encoder_matrix(CODES["floater-hormann-0"]), encoder_matrix(CODES["berrut-chebyshev"]))


# ---- polynomials -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", TABLE_LAYOUTS)
@pytest.mark.parametrize("degree", [1, 2, 3])
@each_mask
def test_lagrange_decoder_is_numpys_least_squares_through_means(layout, degree, mask):
    placed = TABLE_LAYOUTS[layout]
    code = LagrangeCode(placed.data, placed.workers, degree=degree)
    returned, y = returned_of(mask, "lagrange-2-chebyshev"), normal(NUM_WORKERS, 2, dtype=float)
    t, mean, _ = merged(code.nodes.workers[returned], y[returned])
    fit = chebyshev.chebfit(t, mean, min((NUM_DATA - 1) * degree, len(t) - 1))
    assert_close(decoded(code, y, returned), chebyshev.chebval(code.nodes.data, fit).T)


@pytest.mark.parametrize("name", ["lagrange-2-chebyshev", "bspline-lagrange"])
def test_lagrange_encoder_is_numpys_polynomial(name):
    code, x = CODES[name], normal(NUM_DATA, 2, dtype=float)
    fit = chebyshev.chebfit(code.nodes.data, x, NUM_DATA - 1)
    assert_close(encoder_matrix(code) @ x, chebyshev.chebval(code.nodes.workers, fit).T)


@in_x64
def through_a_square(code, x, returned):
    return code.decode(3 * code.encode(x) ** 2 - code.encode(x), returned)


@pytest.mark.parametrize("mask", ["all", "random-third-missing", "last-run-missing"])
def test_lagrange_is_exact_for_a_polynomial_with_enough_answers(mask):
    code = LagrangeCode.chebyshev(4, NUM_WORKERS, degree=2)
    returned, x = returned_of(mask, "lagrange-2-chebyshev"), normal(4, 2, dtype=float)
    assert returned.sum() >= 7
    assert_close(through_a_square(code, x, returned), 3 * x**2 - x)


def test_lagrange_is_not_exact_with_one_answer_too_few():
    code = LagrangeCode.chebyshev(4, NUM_WORKERS, degree=2)
    x = normal(4, 2, dtype=float)
    assert np.abs(through_a_square(code, x, np.arange(NUM_WORKERS) < 6) - (3 * x**2 - x)).max() > 1e-3


def test_a_polynomial_of_degree_forty_keeps_its_digits():
    code = LagrangeCode(nodes.chebyshev_first(41), nodes.chebyshev_second(120))
    coefficients = normal(41, dtype=float)
    values = chebyshev.chebval(code.nodes.workers, coefficients)
    expected = chebyshev.chebval(code.nodes.data, coefficients)
    assert_close(decoded(code, values, np.arange(120) % 3 != 1), expected, 1e-11)


# ---- B-splines ---------------------------------------------------------------------------------------------


@needs_floater_hormann
def test_bspline_may_encode_as_berrut():
    code, x = CODES["bspline-chebyshev"], normal(NUM_DATA, 2, dtype=float)
    assert_close(encoder_matrix(code) @ x, FloaterHormann(code.nodes.data, x, d=0)(code.nodes.workers))


@pytest.mark.parametrize("layout", TABLE_LAYOUTS)
@each_mask
def test_bspline_decoder_is_scipys(layout, mask):
    name = f"bspline-{layout}"
    code, returned, y = CODES[name], returned_of(mask, name), normal(NUM_WORKERS, 2, dtype=float)
    t, mean, _ = merged(code.nodes.workers[returned], y[returned])
    curves = [scipy.interpolate.CubicSpline(t, mean, bc_type="not-a-knot")] if len(t) > 1 else [lambda at: mean]
    if len(t) > 3:
        curves.append(scipy.interpolate.make_interp_spline(t, mean, k=3))
    for curve in curves:
        assert_close(decoded(code, y, returned), np.broadcast_to(curve(code.nodes.data), (NUM_DATA, 2)))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_bspline_decoder_with_few_answers(count):
    code, y = CODES["bspline-chebyshev"], normal(NUM_WORKERS, 2, dtype=float)
    returned = np.isin(np.arange(NUM_WORKERS), [1, 4, 6, 9, 11][:count])
    curve = scipy.interpolate.CubicSpline(code.nodes.workers[returned], y[returned], bc_type="not-a-knot")
    assert_close(decoded(code, y, returned), curve(code.nodes.data))
