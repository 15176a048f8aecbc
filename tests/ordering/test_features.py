"""Features whose distances are changes of a model's answers."""

import contextlib
import functools

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from scipy.spatial.distance import cdist

from jaxcode import SplineCode, coded, ordering

from ..strict_modes import STRICT_MODES
from .cases import AXIS_TYPES, SPECS, model, normal


def test_sensitivity_of_a_linear_model_gives_distances_of_its_answers():
    weights = normal(6, 3, seed=1)
    x = jnp.asarray(normal(50, 6))
    features = ordering.sensitivity(lambda x: x @ weights, x, num_probes=20_000)(x)
    np.testing.assert_allclose(cdist(features, features), cdist(x @ weights, x @ weights), rtol=0.05, atol=1e-5)


def test_features_that_a_model_ignores_do_not_order():
    x = jnp.asarray(np.concatenate([normal(40, 1), 100 * normal(40, 5, seed=1)], axis=1))

    def f(x):
        return {"only": jnp.tanh(x[:, :1])}

    order = ordering.greedy(x, 8, key=ordering.sensitivity(f, x, num_probes=64))
    places = np.asarray(x)[np.asarray(order), 0]
    reversals = np.abs(np.diff(np.sign(np.diff(places)))).sum() / 2
    assert reversals <= 1


def test_sensitivity_of_trees_in_a_coded_call():
    def f(x):
        return jnp.sin(x["a"]).sum(axis=1) + x["b"]

    x = {"a": jnp.asarray(normal(30, 2)), "b": jnp.asarray(normal(30, seed=3), jnp.bfloat16)}
    order = ordering.Greedy(key=ordering.sensitivity(f, x))
    results = coded(f, SplineCode.systematic(5, 8), order=order)(x)
    np.testing.assert_allclose(results, f(x), atol=0.05)


@pytest.mark.parametrize(
    ("x", "message"), [({"a": jnp.arange(4)}, r"x_sample\['a'\] has dtype int32"), ({}, "x_sample is {}")]
)
def test_what_has_no_derivatives(x, message):
    with pytest.raises(ValueError, match=message):
        ordering.sensitivity(lambda x: x, x)


# ---- features as pytrees and settings ----------------------------------------------------------------------

FEATURES = ordering.sensitivity(model, normal(20, 3), num_probes=30)


def test_features_are_pytrees_of_their_directions():
    leaves, structure = jax.tree.flatten(FEATURES)
    assert [leaf.shape for leaf in leaves] == [(30, 3)]
    doubled = jax.tree.unflatten(structure, [2 * leaves[0]])
    x = normal(5, 3)
    np.testing.assert_allclose(doubled(x), 2 * FEATURES(x), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda features, x: features(x))(FEATURES, x), FEATURES(x), rtol=1e-6)
    np.testing.assert_array_equal(cloudpickle.loads(cloudpickle.dumps(ordering.Greedy(key=FEATURES)))(x, 2).shape, (5,))


@pytest.mark.parametrize("x", [normal(5, 4), {"a": normal(5, 3)}, normal(5, 3, 1)], ids=["columns", "tree", "axes"])
def test_features_of_other_inputs_are_refused(x):
    with pytest.raises(ValueError, match=r"x has leaves of shapes .*; expected .*\(3,\)"):
        FEATURES(x)


def test_orders_by_features_are_equal_only_for_the_same_features():
    assert ordering.Greedy(key=FEATURES) == ordering.Greedy(key=FEATURES)
    assert ordering.Greedy(key=FEATURES) != ordering.Greedy(key=ordering.sensitivity(model, normal(20, 3)))
    find_order = jax.jit(lambda x, order: order(x, 5), static_argnums=1)
    for _ in range(2):
        order = ordering.Greedy(key=FEATURES)
        np.testing.assert_array_equal(find_order(normal(20, 3), order), order(normal(20, 3), 5))
    assert find_order._cache_size() == 1


# ---- modes and meshes --------------------------------------------------------------------------------------

find_directions = functools.partial(ordering.sensitivity, model, num_probes=30, model_batch=8)
COMPUTATIONS = {
    "features": FEATURES,
    "directions": lambda x: find_directions(x).directions,
    "order": lambda x: ordering.Greedy(key=FEATURES)(x, 5),
}


@pytest.mark.parametrize("mode", STRICT_MODES)
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("compute", COMPUTATIONS.values(), ids=COMPUTATIONS)
def test_the_same_in_strict_modes(compute, on_device, mode):
    x = jax.device_put(normal(40, 3)) if on_device else normal(40, 3)
    expected = np.asarray(compute(x))
    with STRICT_MODES[mode]():
        found = compute(x)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("axis_types", AXIS_TYPES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mesh_is_set", [False, True])
def test_the_same_on_a_mesh(axis_types, spec, mesh_is_set):
    x, weights = normal(40, 4), normal(4, 4, seed=5)

    def compute(x):
        features = ordering.sensitivity(lambda x: jnp.tanh(x @ weights), x, num_probes=30, model_batch=8)
        return ordering.Greedy(key=features)(x, 5), features(x)

    expected = compute(jnp.asarray(x))
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=AXIS_TYPES[axis_types])
    with jax.set_mesh(mesh) if mesh_is_set else contextlib.nullcontext():
        sharded = x if SPECS[spec] is None else jax.device_put(x, NamedSharding(mesh, SPECS[spec]))
        # Compiled as one where the mesh is set, evaluated eagerly where it is not.
        found = (jax.jit(compute) if mesh_is_set else compute)(sharded)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)
