"""JAX's strict modes: promotion of dtypes and ranks, transfers between host and device, NaN checks, x64 on and off."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode.linops import apply

from .cases import INTERPOLANTS, KNOTS, MASKS, POINTS, each_interpolant


@contextlib.contextmanager
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
        yield


@pytest.fixture(params=[False, True], ids=["x64 off", "x64 on"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


def values_of(dtype):
    return jnp.asarray(np.random.default_rng(0).normal(size=(len(KNOTS), 3)), dtype)


def results_of(interpolant):
    """Functions of (values, returned): results, and gradients of them."""

    def results(values, returned):
        return apply(interpolant.linop(KNOTS, POINTS, returned), values)

    def loss(values, returned, knots, points):
        return jnp.sum(apply(interpolant.linop(knots, points, returned), values) ** 2)

    def gradients(values, returned):
        return jax.grad(loss, (0, 2, 3))(values, returned, jnp.asarray(KNOTS), jnp.asarray(POINTS))

    return results, gradients


@each_interpolant
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.usefixtures("x64")
def test_strict_promotion_and_nan_checks(name, dtype):
    results, gradients = results_of(INTERPOLANTS[name])
    compiled, compiled_gradients = jax.jit(results), jax.jit(gradients)
    values = values_of(dtype)
    with strict():
        for mask, returned in MASKS.items():
            found = results(values, returned)
            assert found.dtype == values.dtype
            traced = compiled(values, jnp.asarray(returned))
            np.testing.assert_allclose(np.float64(traced), np.float64(found), rtol=2e-2, atol=2e-2, err_msg=mask)
            for slope in compiled_gradients(values, jnp.asarray(returned)):
                assert np.isfinite(np.float64(slope)).all(), mask


@each_interpolant
def test_no_tracer_leaks(name):
    results, _ = results_of(INTERPOLANTS[name])
    with jax.checking_leaks():
        jax.jit(results)(values_of("float32"), jnp.asarray(MASKS["some"]))


@each_interpolant
@pytest.mark.usefixtures("x64")
def test_nothing_is_transferred_once_warm(name):
    results, gradients = results_of(INTERPOLANTS[name])
    compiled, slopes = jax.jit(results), jax.jit(gradients)
    values, static = values_of("float32"), MASKS["some"]
    returned = jnp.asarray(static)
    first = compiled(values, returned), slopes(values, returned), results(values, static)
    with jax.transfer_guard("disallow"):
        again = compiled(values, returned), slopes(values, returned), results(values, static)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("x64")
def test_the_guard_notices_a_transfer():
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed"):
        jax.jit(lambda x: x + 1)(np.ones(3))
