"""Linear maps applied to few and many features, with and without garbage in rows that are not read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import ReplicationCode, SplineCode
from jaxcode._float64 import Halves, as_arguments, halve
from jaxcode._maps import _FEW, Matrix, apply, apply_to_groups
from jaxcode.splines import maps

N = 12
SOME = np.arange(N) % 3 != 1


def one_matrix(returned):
    return SplineCode.chebyshev(5, N, decoder_smoothing=1e-3).decoder_map(returned)


def blocks(returned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "MOST_IN_ONE_MATRIX", 0)
        patch.setattr(maps, "ENTRIES_IN_A_BLOCK", 4)
        return one_matrix(returned)


def selection(returned):
    return ReplicationCode(5, N).decoder_map(returned)


FORMS = {"one matrix": one_matrix, "blocks": blocks, "selection": selection}
each_form = pytest.mark.parametrize("form", FORMS)
# Few features are multiplied with care at once, many are looked at again.
each_width = pytest.mark.parametrize("width", [3, _FEW // N + 5], ids=["few", "many"])


def rows_of(width, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(N, width)).astype(dtype)


def expected(linear, rows):
    return np.asarray(linear.matrix(), np.float64) @ np.asarray(rows, np.float64)


@each_form
@each_width
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_that_are_not_read_may_hold_anything(form, width, dtype):
    linear, rows = FORMS[form](SOME), jnp.asarray(rows_of(width), dtype)
    right = expected(linear, rows)
    spoilt = rows.at[1].set(jnp.nan).at[4, : width // 2].set(jnp.inf)
    huge = rows.at[4].set(jnp.finfo(dtype).max)
    bound = 8 * float(jnp.finfo(dtype).eps) * np.abs(right).max()
    for found in (apply(linear, spoilt), apply(linear, huge)):
        assert found.dtype == rows.dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), right, rtol=0, atol=bound)


@each_width
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("form", "present", "lost"),
    [("one matrix", [3], range(5)), ("blocks", [3], range(5)), ("selection", [3], [0, 1, 2, 4])],
)
def test_results_that_there_are_not_are_nan(form, present, lost, width, dtype):
    linear, rows = FORMS[form](np.isin(np.arange(N), present)), jnp.asarray(rows_of(width), dtype)
    found = np.asarray(jax.jit(apply)(linear, rows), np.float32)
    np.testing.assert_array_equal(np.isnan(found), np.isin(np.arange(5), lost)[:, None] & np.ones(width, bool))


@each_width
@pytest.mark.parametrize("form", ["one matrix", "blocks"])
def test_products_that_cancel_keep_their_digits(form, width):
    """From two neighbours a curve is carried far: entries in the tens, and a constant comes out all the same."""
    linear = FORMS[form](np.isin(np.arange(N), [0, 1]))
    assert np.abs(linear.matrix()).sum(axis=1).max() > 16
    rows = jnp.asarray(rows_of(width) * 1e-3 + 1000)
    found = jax.jit(lambda rows: apply(linear, rows))(rows)
    error = np.abs(np.asarray(found, np.float64) - expected_in_double(form, rows)).max()
    assert error <= 0.6 * np.spacing(np.float32(1000))
    careless = np.asarray(apply_to_groups("y", linear, rows, 1), np.float64) - expected_in_double(form, rows)
    assert np.abs(careless).max() > 2e-7 * 1000  # without a second look


def expected_in_double(form, rows):
    with jax.enable_x64(True):
        return np.asarray(FORMS[form](np.isin(np.arange(N), [0, 1])).matrix()) @ np.asarray(rows, np.float64)


@each_form
@each_width
def test_groups_are_taken_one_by_one(form, width):
    linear = FORMS[form](SOME)
    rows = np.stack([rows_of(width), -2 * rows_of(width)])
    rows[:, 1] = np.nan
    found = apply_to_groups("y", linear, jnp.asarray(rows.reshape(2 * N, width)), 2).reshape(2, 5, width)
    for group, data in zip(found, np.nan_to_num(rows), strict=True):
        np.testing.assert_allclose(group, expected(linear, data), rtol=0, atol=1e-5)


@each_form
@each_width
def test_gradients_are_the_transpose_and_none_reaches_what_is_not_read(form, width):
    linear, rows = FORMS[form](SOME), jnp.asarray(rows_of(width)).at[1].set(jnp.nan)
    pull = np.random.default_rng(1).normal(size=(5, width)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda rows: jnp.sum(pull * apply(linear, rows))))(rows)
    right = np.asarray(linear.matrix(), np.float64).T @ pull
    np.testing.assert_allclose(gradient, right, rtol=0, atol=1e-5)
    assert not np.asarray(gradient)[~SOME].any()


@each_form
def test_trailing_axes_of_length_zero(form):
    linear = FORMS[form](SOME)
    assert apply(linear, jnp.zeros((N, 0))).shape == (5, 0)
    assert apply_to_groups("y", linear, jnp.zeros((2 * N, 0, 3)), 2).shape == (10, 0, 3)


@pytest.mark.parametrize("x64", [False, True])
def test_halves_keep_all_digits_through_jit(x64):
    numbers = np.random.default_rng(0).normal(size=5) * 10.0 ** np.arange(-2, 3)
    with jax.enable_x64(x64):
        halves = jax.jit(lambda h: h)(as_arguments(as_arguments(halve(numbers))))
        assert isinstance(halves, Halves)
        assert halves.high.dtype == (jnp.float64 if x64 else jnp.float32)
        whole = jax.jit(lambda h: h.whole())(halves)
        np.testing.assert_allclose(np.asarray(whole), numbers, rtol=0 if x64 else 1e-14)


def test_a_matrix_of_data_in_double_is_applied_in_double():
    with jax.enable_x64(True):
        entries = np.random.default_rng(0).normal(size=(4, N))
        rows = rows_of(3, np.float64)
        np.testing.assert_allclose(apply(Matrix(halve(entries)), jnp.asarray(rows)), entries @ rows, rtol=1e-13)
