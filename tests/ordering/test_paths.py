"""Short paths through a batch, and batches that `coded` orders."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from jaxcode import SplineCode, coded, metrics, ordering, stragglers

from ..strict_modes import STRICT_MODES
from .cases import AXIS_TYPES, CODE, RETURNED, SPECS, model, normal

greedy = jax.jit(ordering.greedy, static_argnums=1, static_argnames=("key", "metric"))


def tour_length(x, order):
    rows = np.asarray(x, np.float64).reshape(len(x), -1)[np.asarray(order)]
    return np.linalg.norm(rows - np.roll(rows, -1, axis=0), axis=1).sum()


def length_within_groups(x, order, size):
    rows = np.asarray(x, np.float64).reshape(len(x), -1)[np.asarray(order)]
    steps = np.linalg.norm(np.diff(rows, axis=0), axis=1)
    return sum(steps[start : start + size - 1].sum() for start in range(0, len(x), size))


def is_permutation(order, size):
    return np.array_equal(np.sort(np.asarray(order)), np.arange(size))


@pytest.mark.parametrize(("size", "num_data"), [(1, 2), (2, 5), (3, 2), (7, 5), (40, 64)])
def test_a_permutation_of_any_batch(size, num_data):
    assert is_permutation(greedy(normal(size, 3), num_data), size)


def test_points_on_a_circle_are_ordered_by_angle():
    shuffled = np.random.default_rng(0).permutation(60)
    angle = 2 * np.pi * shuffled / 60
    order = greedy(np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32), 6)
    steps = np.diff(shuffled[np.asarray(order)]) % 60
    assert set(steps) in ({1}, {59})


def test_nearly_as_short_as_the_shortest_path():
    for seed in range(5):
        x = normal(8, 2, seed=seed)
        d = cdist(x, x)
        paths = np.array(list(itertools.permutations(range(8))))
        best = d[paths[:, :-1], paths[:, 1:]].sum(axis=1).min()
        assert length_within_groups(x, greedy(x, 8), 8) <= 1.05 * best


def test_no_reversed_stretch_makes_the_path_shorter():
    x = normal(60, 2)
    path = np.asarray(greedy(x, 60))
    found = length_within_groups(x, path, 60)
    for first, last in itertools.combinations(range(61), 2):
        other = np.concatenate([path[:first], path[first:last][::-1], path[last:]])
        assert length_within_groups(x, other, 60) > found - 1e-4


def test_one_coordinate_is_sorted():
    x = normal(50, 1)
    steps = np.diff(x[np.asarray(greedy(x, 5)), 0])
    assert (steps > 0).all() or (steps < 0).all()


def test_shorter_than_nearest_neighbour_and_far_shorter_than_the_batch():
    x = load_digits().data[:400].astype(np.float32)
    d = cdist(x, x)
    unvisited, path = d.copy(), [0]
    for _ in range(399):
        unvisited[:, path[-1]] = np.inf
        path.append(int(unvisited[path[-1]].argmin()))
    found = tour_length(x, greedy(x, 20))
    assert found < tour_length(x, path) < 0.7 * tour_length(x, np.arange(400))
    assert found < 0.97 * tour_length(x, path)


@pytest.mark.parametrize(("size", "num_data"), [(60, 6), (62, 6)])
def test_split_where_the_steps_are_longest(size, num_data):
    """No other split of the same tour into the same groups is shorter."""
    x = normal(size, 4)
    order = np.asarray(greedy(x, num_data))
    found = length_within_groups(x, order, num_data)
    others = [length_within_groups(x, np.roll(order, -shift), num_data) for shift in range(num_data)]
    assert found <= min(others) * (1 + 1e-6)


def test_groups_are_the_clusters_where_there_are_some():
    middle = 100 * normal(6, 5)
    x = np.repeat(middle, 4, axis=0) + normal(24, 5, seed=1)
    shuffled = np.random.default_rng(2).permutation(24)
    groups = (shuffled[np.asarray(greedy(x[shuffled], 4))] // 4).reshape(6, 4)
    assert (groups == groups[:, :1]).all()


def test_key_and_metric_decide_what_is_near():
    x = np.stack([normal(30), 100 * normal(30, seed=1)], axis=1)
    by_key = greedy(x, 30, key=lambda rows: rows[:, :1])
    by_metric = greedy(x, 30, metric=lambda a, b: jnp.abs(a[0] - b[0]))
    for order in (by_key, by_metric):
        # Along the first coordinate, and in one step back.
        assert tour_length(x[:, :1], order) == pytest.approx(2 * np.ptp(x[:, 0]), rel=1e-4)
    assert tour_length(x[:, :1], greedy(x, 30)) > 3 * np.ptp(x[:, 0])


@pytest.mark.parametrize("metric", [lambda a, b: jnp.sum(a != b), lambda a, b: jnp.any(a != b)])
def test_a_metric_of_integers_or_bools(metric):
    x = np.repeat(np.eye(6, 3, dtype=np.int32), 3, axis=0)[np.random.default_rng(0).permutation(18)]
    order = greedy(x, 3, metric=metric)
    assert is_permutation(order, 18)
    # One path: equal inputs are neighbours, nine of which are zero.
    assert np.count_nonzero((x[np.asarray(order)] != np.roll(x[np.asarray(order)], 1, axis=0)).any(axis=1)) == 4


def test_a_metric_of_pytrees():
    x = {"colour": normal(20), "name": np.arange(20, dtype=np.int32) % 4}

    def metric(a, b):
        return 100.0 * (a["name"] != b["name"]) + jnp.abs(a["colour"] - b["colour"])

    order = np.asarray(greedy(x, 5, metric=metric))
    assert (x["name"][order].reshape(4, 5) == x["name"][order][::5, None]).all()
    assert is_permutation(greedy(x, 5), 20)


def test_jit_and_vmap_agree_with_single_batches():
    batches = normal(3, 25, 4)
    orders = jax.jit(jax.vmap(lambda x: ordering.greedy(x, 5)))(batches)
    for x, order in zip(batches, orders, strict=True):
        np.testing.assert_array_equal(ordering.greedy(x, 5), order)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "uint8", "bool"])
def test_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(10 * normal(33, 4)).astype(dtype)
        order = ordering.greedy(x, 5)
        assert order.dtype == jnp.int32
        assert is_permutation(order, 33)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_that_are_not_finite_leave_a_permutation(bad):
    x = normal(20, 3)
    x[4] = bad
    order = np.asarray(greedy(x, 5))
    assert is_permutation(order, 20)
    finite = np.delete(x, 4, axis=0)
    rest = order[order != 4]
    rest = rest - (rest > 4)
    assert tour_length(finite, rest) < 1.1 * tour_length(finite, greedy(finite, 5)) + 4


@pytest.mark.parametrize("size", [128, 1000])
def test_parts_of_a_long_batch(monkeypatch, size):
    """Split into parts the tour is a little longer, and still visits each input once."""
    x = normal(size, 2)
    whole = tour_length(x, ordering.greedy(x, 10))
    monkeypatch.setattr(ordering.paths, "MAX_PATH_LENGTH", 64)
    # Of another shape, which no other test compiles for, and as far from each other.
    order = ordering.greedy(np.pad(x, [(0, 0), (0, 7)]), 10)
    assert is_permutation(order, size)
    assert tour_length(x, order) < 1.5 * whole


def test_copies_of_one_input():
    assert is_permutation(greedy(np.zeros((30, 2), np.float32), 4), 30)


X = normal(6, 2)
REFUSED = {
    "no-leaves": (({}, 5), {}, "x is {}"),
    "empty": ((np.zeros((0, 3)), 5), {}, "x has leaves of shapes"),
    "0-d": ((np.float32(1), 5), {}, r"x has leaves of shapes \[\(\)\]"),
    "a-float": ((1.5, 5), {}, r"x has leaves of shapes \[\(\)\]"),
    "text": ((np.array(["a", "b"]), 2), {}, "x is array.*; expected numbers"),
    "complex": (({"a": X + 1j}, 2), {}, r"x\['a'\] has dtype complex.*; expected real"),
    "random-keys": ((jax.random.split(jax.random.key(0), 4), 2), {}, "x has dtype key.*; expected real"),
    "unequal-leaves": (((np.zeros((3, 2)), np.zeros((4, 2))), 5), {}, "x has leaves of shapes"),
    "no-group": ((X, 0), {}, "num_data is 0"),
    "half-an-input": ((X, 2.5), {}, "num_data is 2.5"),
    "a-bool": ((X, True), {}, "num_data is True"),
    "key": ((X, 2), {"key": 3}, "key is 3; expected a function"),
    "key-of-fewer": ((X, 2), {"key": lambda x: x[:2]}, r"key\(x\) has 2 rows"),
    "key-of-one-number": ((X, 2), {"key": lambda x: x.sum()}, r"key\(x\) has leaves of shapes"),
    "key-of-complex": ((X, 2), {"key": lambda x: x + 1j}, r"key\(x\) has dtype complex"),
    "metric": ((X, 2), {"metric": "euclidean"}, "metric is 'euclidean'; expected a function"),
    "metric-of-arrays": (
        (X, 2),
        {"metric": lambda a, b: a - b},
        r"metric returned shape \(2,\).*; expected one number",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(unchecked, case):
    arguments, settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ordering.greedy(*arguments, **settings)
    with pytest.raises(ValueError, match=message):
        ordering.Greedy(**settings)(*arguments)


# ---- modes and meshes --------------------------------------------------------------------------------------


def first_of_two(rows):
    return rows[:, :1]


def city_block(a, b):
    return jnp.sum(jnp.abs(a - b))


ORDERS = {
    "greedy": ordering.greedy,
    "metric": ordering.Greedy(metric=city_block),
    "parts": ordering.greedy,
}


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    if request.param == "parts":
        monkeypatch.setattr(ordering.paths, "MAX_PATH_LENGTH", 16)
    return ORDERS[request.param]


@pytest.mark.parametrize("mode", STRICT_MODES)
@pytest.mark.parametrize("on_device", [False, True])
def test_the_same_in_strict_modes(order, on_device, mode):
    x = jax.device_put(normal(40, 3)) if on_device else normal(40, 3)
    expected = np.asarray(order(x, 5))
    with STRICT_MODES[mode]():
        found = order(x, 5)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("axis_types", AXIS_TYPES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mesh_is_set", [False, True])
def test_the_same_on_a_mesh(axis_types, spec, mesh_is_set):
    x = normal(40, 4)

    def find_orders(x):
        return ordering.greedy(x, 5), ordering.Greedy(metric=city_block)(x, 5)

    expected = find_orders(jnp.asarray(x))
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=AXIS_TYPES[axis_types])
    with jax.set_mesh(mesh) if mesh_is_set else contextlib.nullcontext():
        sharded = x if SPECS[spec] is None else jax.device_put(x, NamedSharding(mesh, SPECS[spec]))
        # Compiled as one where the mesh is set, evaluated eagerly where it is not.
        found = (jax.jit(find_orders) if mesh_is_set else find_orders)(sharded)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("axis_types", AXIS_TYPES)
@pytest.mark.parametrize("spec", ["rows", "rows and columns"])
def test_vmap_on_a_mesh(axis_types, spec):
    batches = normal(4, 20, 3)
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=AXIS_TYPES[axis_types])
    with jax.set_mesh(mesh):
        sharded = jax.device_put(batches, NamedSharding(mesh, SPECS[spec]))
        found = jax.jit(jax.vmap(lambda x: ordering.greedy(x, 5)))(sharded)
    for x, order in zip(batches, found, strict=True):
        np.testing.assert_array_equal(order, ordering.greedy(x, 5))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shards_are_ordered_by_themselves_in_shard_map(axis_type):
    x = normal(40, 4)
    mesh = jax.make_mesh((4,), ("i",), axis_types=(axis_type,))
    rows = PartitionSpec("i")
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, rows))
        found = jax.jit(jax.shard_map(lambda x: ordering.greedy(x, 5), in_specs=rows, out_specs=rows))(sharded)
    for part, order in zip(x.reshape(4, 10, 4), found.reshape(4, 10), strict=True):
        np.testing.assert_array_equal(order, ordering.greedy(part, 5))


# ---- orders as static arguments ----------------------------------------------------------------------------


def test_orders_of_equal_settings_are_traced_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def find_order(x, order):
        traces.append(order)
        return order(x, 5)

    for _ in range(2):
        for settings in ({}, {"key": first_of_two}, {"key": first_of_two, "metric": city_block}):
            order, x = ordering.Greedy(**settings), normal(20, 3)
            np.testing.assert_array_equal(find_order(x, order), ordering.greedy(x, 5, **settings))
    assert len(traces) == len(set(traces)) == 3


# ---- in coded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 23])
def test_results_come_in_the_order_of_the_inputs(size):
    """As if the caller had sorted the batch, and sorted the results back."""
    x = jnp.asarray(normal(size, 3))
    order = np.asarray(ordering.greedy(x, 5))
    expected = np.empty((size, 4), np.float32)
    expected[order] = coded(model, CODE)(x[order], RETURNED)
    np.testing.assert_allclose(coded(model, CODE, order=ordering.greedy)(x, RETURNED), expected, rtol=1e-5, atol=1e-5)


def test_ordered_answers_are_better():
    x = jax.random.uniform(jax.random.key(1), (200, 1), minval=-1)
    code = SplineCode.chebyshev(num_data=20, num_workers=30)
    returned = stragglers.Uniform(5).sample(jax.random.key(0), num_workers=30)

    def wave(x):
        return x * jnp.sin(4 * x)

    plain, ordered = (
        metrics.rmse(coded(wave, code, order=order)(x, returned), wave(x)) for order in (None, ordering.greedy)
    )
    assert ordered < plain / 50


def test_derivatives_with_an_order():
    x, order = jnp.asarray(normal(20, 3)), ordering.Greedy(key=lambda x: x[:, :2])
    permutation = np.asarray(order(x, 5))
    inverse = np.argsort(permutation)
    with_order, without = coded(model, CODE, order=order), coded(model, CODE)

    def total(predict):
        return lambda x: jnp.sum(jnp.cos(predict(x, RETURNED)))

    expected = jax.grad(total(lambda x, mask: without(x[permutation], mask)[inverse]))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(total(with_order)))(x), expected, rtol=1e-4, atol=1e-4)
    several = jax.vmap(with_order, in_axes=(0, None))(jnp.stack([x, 2 * x]), RETURNED)
    np.testing.assert_allclose(several[1], with_order(2 * x, RETURNED), rtol=1e-4, atol=1e-4)


def test_pytrees_with_any_function_as_order():
    x = {"a": jnp.asarray(normal(7, 2)), "b": jnp.arange(7.0)}
    predict = coded(
        lambda x: {"sum": x["a"].sum(axis=1) + x["b"]}, CODE, order=lambda x, num_data: jnp.argsort(-x["b"])
    )
    assert predict(x, RETURNED)["sum"].shape == (7,)


@pytest.mark.parametrize("order", [lambda x, k: jnp.arange(3), lambda x, k: x[:, 0], lambda x, k: 0])
def test_an_order_that_is_no_permutation(order):
    with pytest.raises(ValueError, match="expected a permutation"):
        coded(model, CODE, order=order)(jnp.asarray(normal(20, 3)))
