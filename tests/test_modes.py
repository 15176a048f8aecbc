"""Modes of JAX that users turn on: strict promotion of dtypes and ranks, transfer guards, NaN checks, x64."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax.sharding import NamedSharding, PartitionSpec

import jaxcode as jc
from jaxcode import ordering, placement, robust

from .codes.cases import CODES, PROGRAMS, returned_of

X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
CODE = jc.SplineCode.systematic(5, 12, decoder_smoothing=1e-3)
MASK = np.arange(12) % 5 != 1
MODEL = linen.Dense(2)
VARIABLES = MODEL.init(jax.random.key(0), X)

MODES = {
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "no transfers": lambda: jax.transfer_guard("disallow"),
    "nans": lambda: jax.debug_nans(True),
    "x64": lambda: jax.enable_x64(True),
    "strict dtypes and x64": lambda: _all_of(jax.numpy_dtype_promotion("strict"), jax.enable_x64(True)),
}
# A decoder is prepared on one device, from which those of a placement get copies.
NO_HOST_TRANSFERS = lambda: _all_of(  # noqa: E731
    jax.transfer_guard_host_to_device("disallow"), jax.transfer_guard_device_to_host("disallow")
)
each_mode = pytest.mark.parametrize("mode", MODES)


@contextlib.contextmanager
def _all_of(*contexts):
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def prior_like(code, group):
    zeros = jnp.zeros_like(group[:1, :2])
    return jc.Plan(prior=jc.Prior(jnp.repeat(zeros, code.num_workers, 0), jnp.repeat(zeros, code.num_data, 0)))


OPTIONS = {
    "plain": dict,
    "ordered": lambda: {"order": ordering.greedy},
    "leave one out": lambda: {"defence": robust.leave_one_out},
    "only finite": lambda: {"defence": robust.only_finite},
    "planned": lambda: {"planner": prior_like},
    "shard_map": lambda: {"placement": placement.shard_map(jax.make_mesh((8,), ("workers",)))},
    "pmap": lambda: {"placement": placement.pmap()},
}


@each_mode
@pytest.mark.parametrize("name", PROGRAMS)
def test_codes_compute_the_same(mode, name):
    """Eagerly and compiled; warm, as transfers are made where programs are."""
    code, returned = CODES[name], returned_of("random-third-missing", name)
    x, on_device = X[:5], jnp.asarray(returned)
    encode, decode = jax.jit(code.encode), jax.jit(code.decode)
    sent, expected = code.encode(x), code.decode(code.encode(x), returned)

    def compute():
        if mode == "no transfers":
            return [decode(encode(x), on_device)]
        if mode == "nans" and np.isnan(expected).any():
            pytest.skip("lost inputs are NaN, which is what this mode looks for")
        return [code.decode(code.encode(x), returned), decode(encode(x), on_device)]

    decode(encode(x), on_device)
    with MODES[mode]():
        found = compute()
    for result in found:
        assert result.dtype == sent.dtype == jnp.float32
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@each_mode
@pytest.mark.parametrize("option", OPTIONS)
def test_coded_models_compute_the_same(mode, option):
    options = OPTIONS[option]()
    # Where workers are spread over devices, so are the arrays: moving these is a transfer too.
    everywhere = NamedSharding(jax.make_mesh((8,), ("workers",)), PartitionSpec())
    variables, x = jax.device_put((VARIABLES, X), everywhere) if "placement" in options else (VARIABLES, X)
    predict = jc.coded((MODEL, variables), CODE, **options)
    expected = predict(x, MASK)
    with NO_HOST_TRANSFERS() if mode == "no transfers" and "placement" in options else MODES[mode]():
        found = predict(x, MASK)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert found.dtype == jnp.float32


@each_mode
@pytest.mark.parametrize(
    "name", ["spline-smoothed", "berrut-chebyshev", "lagrange-2-chebyshev", "replication", "outside"]
)
def test_gradients_compute_the_same(mode, name):
    predict = jc.coded((MODEL, VARIABLES), CODES[name])
    returned = jnp.asarray(returned_of("both-ends-missing", name))

    @jax.jit
    def gradient(x, returned):
        return jax.grad(lambda x: jnp.sum(jnp.sin(predict(x, returned))))(x)

    expected = gradient(X, returned)
    with MODES[mode]():
        found = gradient(X, returned)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "no transfers"])
def test_errors_are_predicted_the_same(mode):
    y = CODE.encode(X[:5])
    expected = CODE.decode_with_error(y, MASK)
    with MODES[mode]():
        found = jax.jit(CODE.decode_with_error)(y, MASK)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)
