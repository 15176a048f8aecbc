import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from jaxcode import SplineCode, coded, metrics, ordering, stragglers

greedy = jax.jit(ordering.greedy, static_argnums=1, static_argnames=("key", "metric"))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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


def test_points_on_a_circle_come_round_it():
    shuffled = np.random.default_rng(0).permutation(60)
    angle = 2 * np.pi * shuffled / 60
    order = greedy(np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32), 6)
    turned = np.diff(shuffled[np.asarray(order)]) % 60
    assert set(turned) in ({1}, {59})


def test_nearly_as_short_as_the_shortest_path():
    for seed in range(5):
        x = normal(8, 2, seed=seed)
        d = cdist(x, x)
        paths = np.array(list(itertools.permutations(range(8))))
        best = d[paths[:, :-1], paths[:, 1:]].sum(axis=1).min()
        assert length_within_groups(x, greedy(x, 8), 8) <= 1.05 * best


def test_no_stretch_walked_backwards_makes_the_path_shorter():
    x = normal(60, 2)
    path = np.asarray(greedy(x, 60))
    found = length_within_groups(x, path, 60)
    for first, last in itertools.combinations(range(61), 2):
        other = np.concatenate([path[:first], path[first:last][::-1], path[last:]])
        assert length_within_groups(x, other, 60) > found - 1e-4


def test_one_coordinate_is_sorted():
    x = normal(50, 1)
    along = np.diff(x[np.asarray(greedy(x, 5)), 0])
    assert (along > 0).all() or (along < 0).all()


def test_shorter_than_nearest_neighbour_and_far_shorter_than_the_batch():
    x = load_digits().data[:400].astype(np.float32)
    d = cdist(x, x)
    left, path = d.copy(), [0]
    for _ in range(399):
        left[:, path[-1]] = np.inf
        path.append(int(left[path[-1]].argmin()))
    found = tour_length(x, greedy(x, 20))
    assert found < tour_length(x, path) < 0.7 * tour_length(x, np.arange(400))
    assert found < 0.97 * tour_length(x, path)


@pytest.mark.parametrize(("size", "num_data"), [(60, 6), (62, 6)])
def test_cut_where_the_steps_are_longest(size, num_data):
    """No other cut of the same tour into the same groups is shorter."""
    x = normal(size, 4)
    order = np.asarray(greedy(x, num_data))
    found = length_within_groups(x, order, num_data)
    others = [length_within_groups(x, np.roll(order, -turn), num_data) for turn in range(num_data)]
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


def test_a_metric_of_pytrees():
    x = {"colour": normal(20), "name": np.arange(20, dtype=np.int32) % 4}

    def metric(a, b):
        return 100.0 * (a["name"] != b["name"]) + jnp.abs(a["colour"] - b["colour"])

    order = np.asarray(greedy(x, 5, metric=metric))
    assert (x["name"][order].reshape(4, 5) == x["name"][order][::5, None]).all()
    assert is_permutation(greedy(x, 5), 20)


def test_jit_and_vmap_agree_with_one_at_a_time():
    batches = normal(3, 25, 4)
    together = jax.jit(jax.vmap(lambda x: ordering.greedy(x, 5)))(batches)
    for x, order in zip(batches, together, strict=True):
        np.testing.assert_array_equal(ordering.greedy(x, 5), order)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "uint8", "bool"])
def test_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(10 * normal(33, 4)).astype(dtype)
        order = ordering.greedy(x, 5)
        assert order.dtype == jnp.int32
        assert is_permutation(order, 33)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_leave_a_permutation(bad):
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
    """Cut into parts the tour is a little longer, and still visits each input once."""
    x = normal(size, 2)
    whole = tour_length(x, ordering.greedy(x, 10))
    monkeypatch.setattr(ordering, "MOST_IN_ONE_PATH", 64)
    # Of another shape, which no other test compiles for, and as far from each other.
    order = ordering.greedy(np.pad(x, [(0, 0), (0, 7)]), 10)
    assert is_permutation(order, size)
    assert tour_length(x, order) < 1.5 * whole


def test_copies_of_one_input():
    assert is_permutation(greedy(np.zeros((30, 2), np.float32), 4), 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, 5), "x is"),
        ((np.zeros((0, 3)), 5), "x has leaves of shapes"),
        ((np.zeros((3, 2)), 0), "num_data is 0"),
        (((np.zeros((3, 2)), np.zeros((4, 2))), 5), "x has leaves of shapes"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        ordering.greedy(*arguments)
    with pytest.raises(ValueError, match=r"key\(x\) has 2 rows"):
        ordering.greedy(normal(5, 2), 3, key=lambda x: x[:2])


# ---- in coded ----------------------------------------------------------------------------------------------


def f(x):
    return jnp.sin(x @ jnp.asarray(normal(3, 4, seed=5)))


CODE = SplineCode.chebyshev(num_data=5, num_workers=12)
RETURNED = np.arange(12) % 4 != 1


@pytest.mark.parametrize("size", [4, 23])
def test_results_come_in_the_callers_order(size):
    """As if the caller had sorted the batch, and sorted the results back."""
    x = jnp.asarray(normal(size, 3))
    order = np.asarray(ordering.greedy(x, 5))
    expected = np.empty((size, 4), np.float32)
    expected[order] = coded(f, CODE)(x[order], RETURNED)
    np.testing.assert_allclose(coded(f, CODE, order=ordering.greedy)(x, RETURNED), expected, rtol=1e-5, atol=1e-5)


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
    x, order = jnp.asarray(normal(20, 3)), functools.partial(ordering.greedy, key=lambda x: x[:, :2])
    turn = np.asarray(order(x, 5))
    back = np.argsort(turn)
    with_order, without = coded(f, CODE, order=order), coded(f, CODE)

    def total(predict):
        return lambda x: jnp.sum(jnp.cos(predict(x, RETURNED)))

    expected = jax.grad(total(lambda x, mask: without(x[turn], mask)[back]))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(total(with_order)))(x), expected, rtol=1e-4, atol=1e-4)
    several = jax.vmap(with_order, in_axes=(0, None))(jnp.stack([x, 2 * x]), RETURNED)
    np.testing.assert_allclose(several[1], with_order(2 * x, RETURNED), rtol=1e-4, atol=1e-4)


def test_pytrees_with_an_order_of_ones_own():
    x = {"a": jnp.asarray(normal(7, 2)), "b": jnp.arange(7)}
    predict = coded(
        lambda x: {"sum": x["a"].sum(axis=1) + x["b"]}, CODE, order=lambda x, num_data: jnp.argsort(-x["b"])
    )
    assert predict(x, RETURNED)["sum"].shape == (7,)


@pytest.mark.parametrize("order", [lambda x, k: jnp.arange(3), lambda x, k: x[:, 0], lambda x, k: 0])
def test_an_order_that_is_none(order):
    with pytest.raises(ValueError, match="expected a permutation"):
        coded(f, CODE, order=order)(jnp.asarray(normal(20, 3)))


# ---- sensitivity -------------------------------------------------------------------------------------------


def test_sensitive_features_tell_what_a_linear_model_tells():
    weights = normal(6, 3, seed=1)
    x = jnp.asarray(normal(50, 6))
    look = ordering.sensitivity(lambda x: x @ weights, x, num_probes=20_000)
    np.testing.assert_allclose(cdist(look(x), look(x)), cdist(x @ weights, x @ weights), rtol=0.05, atol=1e-5)


def test_what_a_model_does_not_see_does_not_order():
    x = jnp.asarray(np.concatenate([normal(40, 1), 100 * normal(40, 5, seed=1)], axis=1))

    def f(x):
        return {"only": jnp.tanh(x[:, :1])}

    order = ordering.greedy(x, 8, key=ordering.sensitivity(f, x, num_probes=64))
    places = np.asarray(x)[np.asarray(order), 0]
    turns = np.abs(np.diff(np.sign(np.diff(places)))).sum() / 2
    assert turns <= 1


def test_sensitivity_of_trees_in_a_coded_call():
    def f(x):
        return jnp.sin(x["a"]).sum(axis=1) + x["b"]

    x = {"a": jnp.asarray(normal(30, 2)), "b": jnp.asarray(normal(30, seed=3), jnp.bfloat16)}
    order = functools.partial(ordering.greedy, key=ordering.sensitivity(f, x))
    results = coded(f, SplineCode.systematic(5, 8), order=order)(x)
    np.testing.assert_allclose(results, f(x), atol=0.05)


@pytest.mark.parametrize(
    ("x", "message"), [({"a": jnp.arange(4)}, r"x_sample\['a'\] has dtype int32"), ({}, "x_sample is {}")]
)
def test_what_has_no_derivatives(x, message):
    with pytest.raises(ValueError, match=message):
        ordering.sensitivity(lambda x: x, x)
