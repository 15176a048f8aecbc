"""Defences and predicted errors under JAX's strict modes: eager, under jit and under vmap, with x64 on and off."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import ReplicationCode
from jaxcode.robust import SequentialTest, error_locator, finite, leave_one_out, only_finite

from .cases import LAYOUTS, K, N

CODE = LAYOUTS["repeated"]
RETURNED = np.arange(N) % 6 != 1
FAULTY = 21
ANSWERS = np.sin(2 * CODE.nodes.workers[:, None, None] + np.arange(8)[None, :, None] + np.arange(3)[None, None])
ANSWERS[FAULTY] += 3
COPIES, SEQUENTIAL = ReplicationCode(K, N), SequentialTest()

COMPUTATIONS = {
    "finite": lambda y, returned: finite(y, returned),
    "only_finite": lambda y, returned: only_finite(CODE, y, returned).trusted,
    "leave_one_out": lambda y, returned: leave_one_out(CODE, y, returned).trusted,
    "error_locator": lambda y, returned: error_locator(CODE, y, returned, num_faulty=1).trusted,
    "sequential": lambda y, returned: SEQUENTIAL(COPIES, y, returned).evidence,
    "standard_errors": lambda y, returned: CODE.decoder.standard_errors(
        CODE.nodes.workers, y.reshape(N, -1), CODE.nodes.data, returned
    ),
}
WAYS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: jax.vmap(f, (None, 0)),
    "jit-vmap": lambda f: jax.jit(jax.vmap(f, (None, 0))),
}


@contextlib.contextmanager
def strictest(x64):
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.enable_x64(x64),
    ):
        yield


@functools.cache
def expected_results(computation):
    return COMPUTATIONS[computation](jnp.asarray(ANSWERS, jnp.float32), jnp.asarray(RETURNED))


def prepare(computation, way):
    returned = jnp.asarray(RETURNED)
    y = jnp.asarray(ANSWERS, jnp.float32)
    return WAYS[way](COMPUTATIONS[computation]), y, returned[None] if "vmap" in way else returned


@pytest.mark.parametrize(
    "way", ["jit", "jit-vmap", *(pytest.param(way, marks=pytest.mark.long) for way in ("eager", "vmap"))]
)
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_strict_modes_change_nothing(computation, x64, way):
    with strictest(x64):
        function, y, returned = prepare(computation, way)
        found = function(y, returned)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected_results(computation)), strict=True):
        ours, theirs = np.asarray(ours).reshape(np.shape(theirs)), np.asarray(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * np.abs(np.float64(theirs)).max())


# Eager calls of the others move the code's nodes, which are constants of compiled programs.
EAGER = [(computation, way) for computation in ("finite", "only_finite") for way in ("eager", "vmap")]


@pytest.mark.parametrize(
    ("computation", "way"), EAGER + [(name, way) for name in COMPUTATIONS for way in WAYS if "jit" in way]
)
def test_a_second_call_transfers_nothing_implicitly(computation, way):
    function, y, returned = prepare(computation, way)
    expected = function(y, returned)
    with jax.transfer_guard("disallow"):
        found = function(y, returned)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
