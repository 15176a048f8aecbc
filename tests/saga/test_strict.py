"""Runs every method under JAX's strict modes."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from jax.sharding import AxisType

from jaxcode import saga, stragglers

from . import problems

X, Y = problems.classes(64, 6)
LABELS = np.arange(64) % 3
SPARSE = saga.SparseRows.from_scipy(scipy.sparse.csr_array(np.where(np.abs(X) > 0.3, X, 0)))
WIDE = saga.SparseRows.from_scipy(scipy.sparse.random_array((64, 300), density=0.01, rng=np.random.default_rng(0)))
BIAS = {"kernel": np.zeros(6), "bias": np.zeros(())}
MESH = jax.make_mesh((4,), ("machines",), axis_types=(AxisType.Auto,))
EXPLICIT = jax.make_mesh((4,), ("machines",), axis_types=(AxisType.Explicit,))


def generic(w, sample):
    x, y = sample
    return jax.nn.softplus(-y * (x @ w))


def method(kind=saga.DistributedSaga, loss=saga.logistic, **settings):
    return kind(loss, 4, 40, **{"ridge": 0.1, **settings})


CASES = {
    "dense": (method(), np.zeros(6), (X, Y)),
    "dense, bias": (method(), BIAS, (X, Y)),
    "minibatches": (method(batch_size=3), np.zeros(6), (X, Y)),
    "sparse": (method(), np.zeros(6), (SPARSE, Y)),
    "sparse, bias": (method(), BIAS, (SPARSE, Y)),
    "wide": (method(), np.zeros(300), (WIDE, Y)),
    "multinomial": (method(loss=saga.multinomial), np.zeros((6, 3)), (X, LABELS)),
    "squared": (method(loss=saga.squared), np.zeros(6), (X, Y)),
    "lipschitz": (method(sampling="lipschitz"), np.zeros(6), (X, Y)),
    "frozen": (method(correction="frozen"), np.zeros(6), (X, Y)),
    "local": (method(correction="local"), np.zeros(6), (X, Y)),
    "prox": (method(prox=saga.soft_threshold(0.01)), np.zeros(6), (X, Y)),
    "generic": (method(loss=generic, step_size=0.5), np.zeros(6), (X, Y)),
    "mesh": (method(mesh=MESH), np.zeros(6), (X, Y)),
    "mesh, generic": (method(loss=generic, step_size=0.5, mesh=MESH), np.zeros(6), (X, Y)),
    "explicit mesh": (method(mesh=EXPLICIT), np.zeros(6), (X, Y)),
    "minibatch SGD": (method(saga.MinibatchSgd, decay=0.1), np.zeros(6), (X, Y)),
    "FedAvg": (method(saga.FederatedAveraging, decay=0.1), np.zeros(6), (X, Y)),
    "SCAFFOLD": (method(saga.Scaffold, decay=0.1), np.zeros(6), (X, Y)),
}
LIKE_OTHERS = "sparse, bias", "wide", "frozen", "local", "prox", "mesh, generic", "explicit mesh", "FedAvg"
IN_FLOAT32 = "dense", "sparse", "generic", "mesh", "SCAFFOLD"


@contextlib.contextmanager
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
        yield


def work(case, key, returned):
    """Calls all methods of a case, from NumPy arrays to its results."""
    kind, params, data = case
    state = kind.init(params, data)
    state = kind.round(state, key)
    state = kind.round(state, key, returned)
    state, history = kind.run(state, key, 3, every=2, progress=False)
    assert kind.floats_per_round(state) > 0
    return state.params, history.values[-1], kind.objective(params, state)


@pytest.mark.parametrize(
    ("name", "x64"),
    [
        *(pytest.param(name, True, marks=pytest.mark.long if name in LIKE_OTHERS else ()) for name in CASES),
        *((name, False) for name in IN_FLOAT32),
    ],
)
def test_methods_work_in_strict_modes(name, x64):
    with jax.enable_x64(x64):
        key, returned = jax.random.key(0), np.arange(4) != 1
        with strict():
            result = work(CASES[name], key, returned)
            chex.assert_tree_all_finite(result)
            # A second call transfers nothing implicitly.
            with jax.transfer_guard("disallow"):
                second_result = work(CASES[name], key, returned)
        chex.assert_trees_all_equal(second_result, result)
        assert {leaf.dtype for leaf in jax.tree.leaves(result[0])} == {np.dtype("float64" if x64 else "float32")}


def test_runs_with_stragglers_work_in_strict_modes():
    kind, params, data = CASES["dense"]
    key = jax.random.key(0)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = kind.init(params, data)
        for guard in ("allow", "disallow"):
            with jax.transfer_guard(guard):
                end, _ = kind.run(state, key, 3, stragglers=stragglers.Independent(0.3), progress=False)
    chex.assert_tree_all_finite(end.params)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_may_be_set(axis_type):
    kind, params, data = CASES["dense"]
    mesh = jax.make_mesh((4,), ("machines",), axis_types=(axis_type,))
    expected = work((kind, params, data), jax.random.key(0), np.ones(4, bool))
    with jax.set_mesh(mesh):
        result = work((method(mesh=mesh), params, data), jax.random.key(0), np.ones(4, bool))
    chex.assert_trees_all_close(jax.device_get(result), jax.device_get(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [(), (4,)], ids=["one", "minibatch"])
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("table_dtype", [None, jnp.bfloat16])
def test_the_transformation_works_in_strict_modes(x64, batch, table_dtype):
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        params = jax.device_put({"w": np.ones((2, 3), dtype), "b": np.ones(3, dtype)})
        gradients = jax.device_put(jax.tree.map(lambda leaf: np.ones((*batch, *leaf.shape), dtype), params))
        index = jax.device_put(np.arange(4, dtype=np.int32) if batch else np.int32(1))
        transformation = saga.scale_by_saga(5, table_dtype=table_dtype)
        optimizer = saga.saga(0.1, 5, table_dtype=table_dtype)

        @jax.jit
        def step(params, state, gradients, index):
            updates, state = optimizer.update(gradients, state, params, index=index)
            return optax.apply_updates(params, updates), state

        with strict():
            for guard in ("allow", "disallow"):
                with jax.transfer_guard(guard):
                    estimate, _ = transformation.update(gradients, transformation.init(params), index=index)
                    transformation.update(gradients, transformation.init(params), index=np.asarray(index))
        with strict():
            state = optimizer.init(params)
            for guard in ("allow", "disallow"):
                with jax.transfer_guard(guard):
                    stepped, _ = step(params, state, gradients, index)
        chex.assert_trees_all_close(estimate, params)
        chex.assert_trees_all_equal_dtypes(estimate, params, stepped)
        chex.assert_trees_all_close(stepped, jax.tree.map(lambda leaf: 0.9 * leaf, params), rtol=1e-6)
