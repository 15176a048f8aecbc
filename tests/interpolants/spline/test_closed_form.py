"""What splines promise beyond accuracy: other oracles, weights, repeated knots, masks, derivatives, arguments."""

import functools

import csaps
import interpax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import make_smoothing_spline

from jaxcode.interpolants.spline import Spline, fit_and_evaluate, smoother_matrix, spline_matrix

from . import cases

RNG = np.random.default_rng(0)
KNOTS = np.sort(RNG.uniform(-1, 1, 12))
POINTS = np.linspace(-0.9, 1.3, 7)
VALUES = np.stack([np.sin(3 * KNOTS), RNG.normal(size=12)], axis=1)
MASK = np.arange(12) % 4 != 1


def test_agrees_with_interpax_between_knots():
    inside = np.linspace(KNOTS[0], KNOTS[-1], 9)
    with jax.enable_x64(True):
        theirs = np.asarray(interpax.CubicSpline(KNOTS, VALUES, bc_type="natural")(inside))
        ours = np.asarray(fit_and_evaluate(KNOTS, jnp.asarray(VALUES), inside))
    np.testing.assert_allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("smooth", [0.9, 0.999])
def test_agrees_with_csaps_between_knots(smooth):
    # csaps minimises p |y - g|^2 + (1 - p) int g''^2, so mu = (1 - p) / p.
    inside = np.linspace(KNOTS[0], KNOTS[-1], 9)
    theirs = csaps.csaps(KNOTS, VALUES.T, inside, smooth=smooth).T
    with jax.enable_x64(True):
        ours = np.asarray(fit_and_evaluate(KNOTS, jnp.asarray(VALUES), inside, smoothing=(1 - smooth) / smooth))
    np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_weights_are_scipys():
    weights = RNG.uniform(0.1, 5, 12)
    inside = np.linspace(KNOTS[0], KNOTS[-1], 9)
    theirs = make_smoothing_spline(KNOTS, VALUES, w=weights, lam=1e-3)(inside)
    with jax.enable_x64(True):
        ours = np.asarray(fit_and_evaluate(KNOTS, jnp.asarray(VALUES), inside, smoothing=1e-3, weights=weights))
    np.testing.assert_allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("smoothing", [0.0, 1e-3])
def test_a_zero_weight_a_mask_and_leaving_the_knot_out_are_the_same(smoothing):
    with jax.enable_x64(True):
        by_weight = np.asarray(spline_matrix(KNOTS, POINTS, smoothing=smoothing, weights=MASK.astype(float)))
        by_mask = np.asarray(spline_matrix(KNOTS, POINTS, smoothing=smoothing, returned=MASK))
        left_out = np.asarray(spline_matrix(KNOTS[MASK], POINTS, smoothing=smoothing))
    np.testing.assert_array_equal(by_weight, by_mask)
    np.testing.assert_allclose(by_mask[:, MASK], left_out, atol=1e-12)
    assert not by_mask[:, ~MASK].any()


@pytest.mark.parametrize("smoothing", [0.0, 1e-3])
def test_knots_at_one_place_count_as_their_weighted_mean(smoothing):
    knots = np.array([-1.0, -1.0, -0.2, 0.4, 0.4, 0.4, 1.0])
    weights = np.array([1.0, 3.0, 1.0, 2.0, 5.0, 1.0, 1.0])
    returned = np.array([True, True, True, True, False, True, True])
    values = RNG.normal(size=(7, 2))
    single = np.array([-1.0, -0.2, 0.4, 1.0])
    totals = np.array([4.0, 1.0, 3.0, 1.0])
    means = np.stack(
        [(values[0] + 3 * values[1]) / 4, values[2], (2 * values[3] + values[5]) / 3, values[6]],
    )
    with jax.enable_x64(True):
        merged = fit_and_evaluate(
            knots, jnp.asarray(values), POINTS, smoothing=smoothing, weights=weights, returned=returned
        )
        expected = fit_and_evaluate(single, jnp.asarray(means), POINTS, smoothing=smoothing, weights=totals)
        np.testing.assert_allclose(np.asarray(merged), np.asarray(expected), atol=1e-12)


def test_data_at_one_place_only_give_its_mean_everywhere():
    matrix = spline_matrix(np.array([-1.0, 0.0, 0.0, 1.0]), POINTS, returned=np.array([False, True, True, False]))
    np.testing.assert_allclose(matrix, np.tile([0, 0.5, 0.5, 0], (len(POINTS), 1)))


def test_straight_lines_are_kept_and_rows_sum_to_one():
    matrix = spline_matrix(KNOTS, POINTS, smoothing=10.0, returned=MASK)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(matrix @ (2 - 3 * KNOTS), 2 - 3 * POINTS, atol=1e-5)


def test_the_smoother_is_symmetric_with_its_eigenvalues_between_zero_and_one():
    with jax.enable_x64(True):
        hat = np.asarray(smoother_matrix(KNOTS, smoothing=1e-2))
    np.testing.assert_allclose(hat, hat.T, atol=1e-13)
    eigenvalues = np.linalg.eigvalsh(hat)
    assert eigenvalues.min() > 0
    assert np.sum(eigenvalues > 1 - 1e-9) == 2  # straight lines, which are not smoothed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_keep_their_dtype_and_shape(dtype):
    values = jnp.asarray(VALUES, dtype).reshape(12, 2, 1)
    out = fit_and_evaluate(KNOTS, values, POINTS, returned=MASK)
    assert out.dtype == values.dtype
    assert out.shape == (7, 2, 1)


def test_integers_become_float32():
    assert fit_and_evaluate(KNOTS, jnp.arange(12), POINTS).dtype == jnp.float32


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_knots_with_data_give_nan(count):
    returned = np.arange(12) < count
    assert np.isnan(spline_matrix(KNOTS, POINTS, returned=returned)).all()
    assert np.isnan(fit_and_evaluate(KNOTS, jnp.asarray(VALUES), POINTS, returned=returned)).all()


def test_values_without_data_are_not_read_nor_are_their_gradients():
    poisoned = jnp.where(MASK[:, None], VALUES, jnp.nan)

    def total(values):
        return fit_and_evaluate(KNOTS, values, POINTS, smoothing=1e-3, returned=MASK).sum()

    assert total(poisoned) == total(jnp.asarray(VALUES, jnp.float32))
    slope = jax.grad(total)(poisoned)
    assert np.isfinite(slope).all()
    assert not slope[~MASK].any()


@functools.cache
def _loss_and_its_gradients(path):
    """Compiled once for all smoothings."""

    def loss(smoothing, knots, weights, points, values):
        if path == "direct":
            out = fit_and_evaluate(knots, values, points, smoothing=smoothing, weights=weights, returned=MASK)
        else:
            matrix = spline_matrix(knots, points, smoothing=smoothing, weights=weights, returned=MASK)
            out = matrix @ values
        return jnp.sum(jnp.sin(out))

    return jax.jit(loss), jax.jit(jax.grad(loss, range(5))), jax.jit(jax.jacfwd(loss, range(5)))


@pytest.mark.parametrize("smoothing", [0.0, 1e-2])
@pytest.mark.parametrize("path", ["matrix", "direct"])
def test_derivatives_agree_with_finite_differences(path, smoothing):
    value, reverse, forward = _loss_and_its_gradients(path)
    with jax.enable_x64(True):
        at = (
            jnp.asarray(smoothing),
            jnp.asarray(KNOTS),
            jnp.linspace(1, 2, 12),
            jnp.asarray(POINTS),
            jnp.asarray(VALUES),
        )
        found_by = reverse(*at), forward(*at)
        for which in range(5):
            direction = np.random.default_rng(which).normal(size=at[which].shape)
            if which == 0:
                direction = np.abs(direction)
            step = 1e-9 if which == 0 and smoothing == 0.0 else 1e-6
            above, below = ([*at[:which], at[which] + sign * step * direction, *at[which + 1 :]] for sign in (1, -1))
            if which == 0 and smoothing == 0.0:  # one-sided: a negative smoothing is refused
                numeric = (-3 * value(*at) + 4 * value(*above) - value(2 * step * direction, *at[1:])) / (2 * step)
            else:
                numeric = (value(*above) - value(*below)) / (2 * step)
            for found in found_by:
                slope = float(np.sum(np.asarray(found[which]) * direction))
                assert slope == pytest.approx(float(numeric), rel=1e-6, abs=1e-6 * abs(float(value(*at))) + 1e-7), which


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.booleans(), min_size=12, max_size=12).filter(lambda m: sum(m) >= 2), st.sampled_from([0.0, 1e-9, 1.0])
)
def test_no_mask_of_two_or_more_gives_nan_in_values_or_gradients(mask, smoothing):
    value, slopes = _value_and_slopes(smoothing, KNOTS, np.array(mask))
    assert np.isfinite(value)
    assert all(np.isfinite(slope).all() for slope in slopes)


@jax.jit
def _value_and_slopes(smoothing, knots, mask):
    def total(smoothing, knots, values):
        matrix = spline_matrix(knots, POINTS, smoothing=smoothing, returned=mask)
        direct = fit_and_evaluate(knots, values, POINTS, smoothing=smoothing, returned=mask)
        return jnp.sum(matrix**2) + jnp.sum(direct**2)

    return jax.value_and_grad(total, argnums=(0, 1, 2))(smoothing, knots, jnp.asarray(VALUES, jnp.float32))


def test_vmap_over_masks_and_smoothings_is_a_loop():
    masks = np.stack(list(cases.masks(12, RNG).values()))
    smoothings = np.linspace(0, 1, len(masks))
    together = jax.vmap(lambda m, s: spline_matrix(KNOTS, POINTS, smoothing=s, returned=m))(masks, smoothings)
    for i, mask in enumerate(masks):
        alone = spline_matrix(KNOTS, POINTS, smoothing=np.float32(smoothings[i]), returned=mask)
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-6)


def test_a_new_mask_does_not_compile_again():
    compiled = jax.jit(lambda mask: spline_matrix(KNOTS, POINTS, returned=mask))
    compiled(MASK)
    compiled(~MASK)
    assert compiled._cache_size() == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knots": KNOTS[::-1]}, r"knots\[0:2\] is .*ascending"),
        ({"knots": KNOTS[:1]}, "knots has shape"),
        ({"knots": KNOTS.reshape(3, 4)}, "knots has shape"),
        ({"knots": np.full(12, np.nan)}, "knots is .*finite"),
        ({"knots": "abc"}, "knots has shape"),
        ({"points": np.ones((2, 2))}, "points has shape"),
        ({"points": [np.inf]}, "points is .*finite"),
        ({"smoothing": -1.0}, "smoothing is -1.0; expected .*0"),
        ({"smoothing": np.nan}, "smoothing is nan"),
        ({"smoothing": [1.0]}, "smoothing has shape"),
        ({"weights": ["a"] * 12}, "weights has dtype"),
        ({"weights": np.ones(3)}, "weights has shape"),
        ({"weights": -np.ones(12)}, "weights is .*0"),
        ({"returned": np.ones(11, bool)}, "returned has shape"),
        ({"returned": np.ones(12)}, "returned has dtype float64; expected bool"),
        ({"returned": np.arange(12)}, "returned has dtype int64.*np.isin"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    arguments = {"knots": KNOTS, "points": POINTS, **change}
    with pytest.raises(ValueError, match=message):
        spline_matrix(arguments.pop("knots"), arguments.pop("points"), **arguments)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("smoothing", [None, {}, "0.1", np.array("0.1"), True])
def test_a_smoothing_that_is_no_number_is_refused_by_name(smoothing):
    for refuse in (Spline, lambda value: spline_matrix(KNOTS, POINTS, smoothing=value)):
        with pytest.raises(ValueError, match=r"smoothing is .*; expected a number"):
            refuse(smoothing)


@pytest.mark.usefixtures("unchecked")
def test_values_must_have_one_row_per_knot():
    with pytest.raises(ValueError, match=r"values has shape \(3,\).*12 knots"):
        fit_and_evaluate(KNOTS, jnp.ones(3), POINTS)
