"""Operators applied to few and many features, with and without garbage in absent rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode.interpolants import Spline
from jaxcode.interpolants.spline import linop as spline_linop
from jaxcode.linops import Dense, Gather, apply, apply_to_tree, split
from jaxcode.linops.application import _MAX_SIZE_TO_MASK
from jaxcode.nodes import chebyshev

N = 12
SOME = np.arange(N) % 3 != 1


def dense(returned):
    layout = chebyshev(5, N)
    return Spline(1e-3).linop(layout.workers, layout.data, returned)


def blocked(returned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spline_linop, "MAX_ENTRIES_IN_MATRIX", 0)
        patch.setattr(spline_linop, "ENTRIES_PER_BLOCK", 4)
        return dense(returned)


def gather(returned):
    index = np.array([0, 2, 3, 5, 6])
    return Gather(index, N, defined=returned[index])


FORMS = {"dense": dense, "blocked": blocked, "gather": gather}
each_form = pytest.mark.parametrize("form", FORMS)
# Few features are multiplied with absent rows hidden, many are multiplied first and checked.
each_width = pytest.mark.parametrize("width", [3, _MAX_SIZE_TO_MASK // N + 5], ids=["few", "many"])


def rows_of(width, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(N, width)).astype(dtype)


def product(linop, rows):
    return np.asarray(linop.matrix(), np.float64) @ np.asarray(rows, np.float64)


@each_form
@each_width
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_absent_rows_may_hold_anything(form, width, dtype):
    linop, rows = FORMS[form](SOME), jnp.asarray(rows_of(width), dtype)
    expected = product(linop, rows)
    infinite = rows.at[1].set(jnp.nan).at[4, : width // 2].set(jnp.inf)
    huge = rows.at[4].set(jnp.finfo(dtype).max)
    bound = 8 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    for results in (apply(linop, infinite), apply(linop, huge)):
        assert results.dtype == rows.dtype
        np.testing.assert_allclose(np.asarray(results, np.float64), expected, rtol=0, atol=bound)


@each_width
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("form", "present", "undefined"),
    [("dense", [3], range(5)), ("blocked", [3], range(5)), ("gather", [3], [0, 1, 3, 4])],
)
def test_undefined_results_are_nan(form, present, undefined, width, dtype):
    linop, rows = FORMS[form](np.isin(np.arange(N), present)), jnp.asarray(rows_of(width), dtype)
    results = np.asarray(jax.jit(apply)(linop, rows), np.float32)
    np.testing.assert_array_equal(np.isnan(results), np.isin(np.arange(5), undefined)[:, None] & np.ones(width, bool))


@each_width
@pytest.mark.parametrize("form", ["dense", "blocked"])
def test_products_that_cancel_keep_their_digits(form, width):
    """From two neighbours a curve is carried far: entries in the tens, and a constant comes out all the same."""
    present = np.isin(np.arange(N), [0, 1])
    linop = FORMS[form](present)
    assert np.abs(linop.matrix()).sum(axis=1).max() > 16
    rows = jnp.asarray(rows_of(width) * 1e-3 + 1000)
    with jax.enable_x64(True):
        expected = np.asarray(FORMS[form](present).matrix()) @ np.asarray(rows, np.float64)
    precise = np.asarray(jax.jit(lambda rows: apply(linop, rows))(rows), np.float64)
    assert np.abs(precise - expected).max() <= 0.6 * np.spacing(np.float32(1000))
    imprecise = np.asarray(apply_to_tree("y", linop, rows, N, float64_fallback=False), np.float64)
    assert np.abs(imprecise - expected).max() > 2e-7 * 1000


@each_form
@each_width
def test_gradients_are_the_transpose_and_zero_for_absent_rows(form, width):
    linop, rows = FORMS[form](SOME), jnp.asarray(rows_of(width)).at[1].set(jnp.nan)
    cotangent = np.random.default_rng(1).normal(size=(5, width)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda rows: jnp.sum(cotangent * apply(linop, rows))))(rows)
    expected = np.asarray(linop.matrix(), np.float64).T @ cotangent
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5)
    assert not np.asarray(gradient)[~SOME].any()


@each_form
def test_trailing_axes(form):
    linop = FORMS[form](SOME)
    assert apply(linop, jnp.zeros((N, 0))).shape == (5, 0)
    tree = {"scalars": jnp.ones(N), "none": jnp.zeros((N, 0, 3)), "images": jnp.asarray(rows_of(6)).reshape(N, 2, 3)}
    results = apply_to_tree("y", linop, tree, N)
    assert {name: leaf.shape for name, leaf in results.items()} == {
        "scalars": (5,),
        "none": (5, 0, 3),
        "images": (5, 2, 3),
    }
    np.testing.assert_allclose(results["images"].reshape(5, 6), product(linop, rows_of(6)), atol=1e-5)


def test_gather_moves_any_dtype_bit_for_bit():
    index, tokens = np.array([4, 0]), jnp.asarray([2**24 + 1, 1, 2, 3, 2**31 - 1])[:, None]
    results = apply(Gather(index, 5, defined=np.array([True, False])), tokens)
    assert results.dtype == tokens.dtype
    assert results.ravel().tolist() == [2**31 - 1, -(2**31)]


@each_form
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strict_promotion_allows_every_form(form, dtype):
    rows = jnp.asarray(rows_of(3), dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert jax.jit(apply)(FORMS[form](SOME), rows).dtype == rows.dtype


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.ones((N - 1, 2)), r"y\['a'\] has shape \(11, 2\); expected a leading axis of 12"),
        (np.array(1.0), r"y\['a'\] has shape \(\)"),
        (np.ones((N, 2), np.int32), r"y\['a'\] has dtype int32; .*embeddings"),
        (np.ones((N, 2), bool), r"y\['a'\] has dtype bool; expected real numbers"),
        (np.ones((N, 2), np.complex64), r"y\['a'\] has dtype complex64; expected real numbers"),
    ],
)
def test_leaves_that_cannot_be_mixed_are_refused_by_name(leaf, message):
    with pytest.raises(ValueError, match=message):
        apply_to_tree("y", dense(SOME), {"a": leaf}, N)


def test_unsigned_bytes_are_mixed_in_float32():
    pixels = np.arange(2 * N, dtype=np.uint8).reshape(N, 2)
    results = apply_to_tree("y", dense(SOME), pixels, N)
    assert results.dtype == jnp.float32
    np.testing.assert_allclose(results, product(dense(SOME), pixels), rtol=1e-5, atol=1e-5)


def test_float64_data_are_multiplied_in_float64():
    with jax.enable_x64(True):
        entries = np.random.default_rng(0).normal(size=(4, N))
        rows = rows_of(3, np.float64)
        np.testing.assert_allclose(apply(Dense(split(entries)), jnp.asarray(rows)), entries @ rows, rtol=1e-13)
