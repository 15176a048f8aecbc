"""Which values the host knows, and that they are copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcode.checks import check_count, check_scalar, static_value

KNOWN = {
    "a-float": 1.5,
    "an-integer": 3,
    "a-bool": True,
    "a-list": [1.0, 2.0],
    "numpy": np.arange(3),
    "numpy-scalar": np.float32(2),
    "mask": np.array([True, False]),
    "jax": jnp.arange(3),
    "bfloat16": jnp.ones(2, jnp.bfloat16),
    "list-of-jax": [jnp.float32(1), 2.0],
}
UNKNOWN = {
    "nothing": None,
    "an-object": object(),
    "objects": np.array([None, 1]),
    "a-shape": jax.ShapeDtypeStruct((3,), np.float32),
    "text": "abc",
    "texts": np.array(["1", "2"]),
    "random-key": jax.random.key(0),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_values_are_numpy_arrays(case):
    with jax.transfer_guard_device_to_host("disallow"):
        value = static_value(KNOWN[case])
    assert isinstance(value, np.ndarray)
    np.testing.assert_array_equal(value, KNOWN[case])


@pytest.mark.parametrize("case", UNKNOWN)
def test_other_values_are_unknown(case):
    assert static_value(UNKNOWN[case]) is None


def test_sharded_arrays_are_known():
    mesh = jax.make_mesh((8,), ("i",))
    sharded = jax.device_put(jnp.arange(16), NamedSharding(mesh, PartitionSpec("i")))
    np.testing.assert_array_equal(static_value(sharded), np.arange(16))


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad, lambda f: lambda x: jax.eval_shape(f, x)])
def test_tracers_are_unknown(transform):
    values = []

    def f(x):
        values.extend([static_value(x), static_value([x, 1.0])])
        return jnp.sum(x)

    transform(f)(jnp.ones(3))
    assert values == [None, None]


def test_values_are_copies():
    array = np.zeros(3)
    value = static_value(array)
    array[:] = 1
    assert not value.any()


def test_an_array_on_an_accelerator_is_not_fetched(monkeypatch):
    class Device:
        platform = "gpu"

    array = jnp.arange(3)
    monkeypatch.setattr(type(array), "devices", lambda self: {Device()})
    assert static_value(array) is None
    # Its shape and dtype are checked all the same.
    check_scalar("x", array[0], lambda number: False, "an integer", integer=True)
    with pytest.raises(ValueError, match=r"x is .*; expected an integer"):
        check_scalar("x", array, lambda number: True, "an integer", integer=True)


def test_a_traced_count_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"count is the tracer .*; expected .*: close over it or make it a static"):
        jax.jit(lambda count: check_count("count", count))(3)
