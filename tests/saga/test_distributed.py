"""Tests distributed SAGA: a NumPy oracle, invariants of every round and rates of convergence."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxcode import saga
from jaxcode.saga import DistributedSaga

from . import problems

KEY = jax.random.key(0)
CORRECTIONS = ["anchored", "own", "frozen"]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def rounds(method, state, count, key=KEY):
    return method.run(state, key, count, every=max(count, 1), progress=False)[0]


def first_state(method, data, params=None):
    x = data[0]
    return method.init(jnp.zeros(x.shape[1]) if params is None else params, data)


def plain_logistic(w, sample):
    """Computes a loss that is not known to be linear, so that the table holds gradients."""
    x, y = sample
    return jax.nn.softplus(-y * (x @ w))


def draw(key, period, x, ridge, sampling):
    """Draws a machine's samples; also returns the probabilities of all, in units of uniform ones."""
    if sampling == "uniform":
        return np.asarray(jax.random.bits(key, (period, 1), jnp.uint32))[:, 0] % len(x), np.ones(len(x))
    p = 0.25 * np.sum(x**2, axis=1) + len(x) * ridge / 3
    p /= p.sum()
    return np.searchsorted(np.cumsum(p), np.asarray(jax.random.uniform(key, (period, 1)))[:, 0], "right"), len(x) * p


def numpy_saga(x, y, sizes, period, ridge, correction, step_size, key, count, sampling="uniform"):
    """Computes distributed SAGA on logistic regression in NumPy, with the same samples."""
    n = len(y)
    ends = np.cumsum(sizes)
    w, slopes = np.zeros(x.shape[1]), -y / 2
    for r in range(count):
        round_key = jax.random.fold_in(key, r)
        sums = [x[e - m : e].T @ slopes[e - m : e] for m, e in zip(sizes, ends, strict=True)]
        c, iterates = sum(sums) / n, []
        for k, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            index, factors = draw(jax.random.fold_in(round_key, k), period, x[end - size : end], ridge, sampling)
            theta = {"anchored": 1, "own": size / n, "frozen": 0}[correction]
            v, total = w.copy(), sums[k].copy()
            for j in end - size + index:
                slope = -y[j] / (1 + math.exp(y[j] * (x[j] @ v)))
                delta = (slope - slopes[j]) * x[j]
                v = v - step_size * (delta / factors[j - end + size] + c + theta * (total - sums[k]) / size + ridge * v)
                total, slopes[j] = total + delta, slope
            iterates.append(size / n * v)
        w = sum(iterates)
    return w, slopes


@pytest.mark.parametrize("loss", [saga.logistic, plain_logistic], ids=["slopes", "gradients"])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("period", [5, 80])
def test_rounds_equal_those_of_numpy(loss, correction, period):
    check_against_numpy(loss, correction, period)


@pytest.mark.parametrize("settings", [{}, {"prox": lambda w, step: w}], ids=["in blocks", "one by one"])
@pytest.mark.parametrize("correction", ["anchored", "own"])
def test_lipschitz_sampling_equals_that_of_numpy(correction, settings):
    check_against_numpy(saga.logistic, correction, 80, sampling="lipschitz", **settings)


def check_against_numpy(loss, correction, period, sampling="uniform", **settings):
    x, y = problems.classes(50, 4)
    sizes = [20, 7, 23]
    method = DistributedSaga(loss, 3, period, 0.1, correction, sampling, step_size=0.5, shard_sizes=sizes, **settings)
    state = rounds(method, first_state(method, (x, y)), 4)
    w, slopes = numpy_saga(x, y, sizes, period, 0.1, correction, 0.5, KEY, 4, sampling)
    np.testing.assert_allclose(state.params, w, rtol=1e-11, atol=1e-12)
    ends = np.cumsum(sizes)
    for k, (m, e) in enumerate(zip(sizes, ends, strict=True)):
        expected = slopes[e - m : e] if loss is saga.logistic else slopes[e - m : e, None] * x[e - m : e]
        np.testing.assert_allclose(state.local["table"][k][:m], expected, rtol=1e-11, atol=1e-12)


def test_with_one_machine_or_a_period_of_one_corrections_are_the_same():
    data = problems.classes(64, 5)
    for machines, period in ((1, 16), (8, 1)):
        results = []
        for correction in CORRECTIONS[: 2 if machines == 1 else 3]:
            method = DistributedSaga(saga.logistic, machines, period, 0.01, correction)
            results.append(rounds(method, first_state(method, data), 50).params)
        for result in results[1:]:
            np.testing.assert_allclose(result, results[0], rtol=0, atol=1e-12)


def test_one_machine_is_the_optax_transformation_step_by_step():
    x, y = problems.classes(40, 3)
    method = DistributedSaga(plain_logistic, 1, 30, step_size=0.3)
    end = rounds(method, first_state(method, (x, y)), 1).params
    transformation = saga.saga(0.3, 40)
    w = jnp.zeros(3)
    state = transformation.init(w)
    gradients = jax.vmap(jax.grad(plain_logistic), (None, 0))(w, (jnp.asarray(x), jnp.asarray(y)))
    saga_state = state[0]._replace(table=gradients, total=gradients.sum(0))
    state = (saga_state, *state[1:])
    index, _ = draw(jax.random.fold_in(jax.random.fold_in(KEY, 0), 0), 30, x, 0, "uniform")
    for j in index:
        gradient = jax.grad(plain_logistic)(w, (x[j], y[j]))
        updates, state = transformation.update(gradient, state, w, index=int(j))
        w = w + updates
    np.testing.assert_allclose(end, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [saga.logistic, plain_logistic], ids=["slopes", "gradients"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_sums_are_those_of_tables_after_every_round(loss, batch_size):
    x, y = problems.classes(100, 6)
    method = DistributedSaga(loss, 7, 9, 0.01, step_size=0.2, batch_size=batch_size)
    state, key = first_state(method, (x, y)), KEY
    for _ in range(12):
        state = method.round(state, key, jnp.asarray(np.random.default_rng(int(state.round)).random(7) < 0.8))
        sizes = np.asarray(state.data.sizes)
        tables = [np.asarray(table)[:size] for table, size in zip(state.local["table"], sizes, strict=True)]
        if loss is saga.logistic:
            parts = np.split(x, np.cumsum(sizes)[:-1])
            sums = [part.T @ table for part, table in zip(parts, tables, strict=True)]
        else:
            sums = [table.sum(0) for table in tables]
        np.testing.assert_allclose(state.messages, sums, rtol=0, atol=1e-10)
        np.testing.assert_allclose(state.message_sum, np.sum(sums, axis=0), rtol=0, atol=1e-10)


def test_lipschitz_sampling_converges_fast_where_samples_differ_in_length():
    x, y = problems.classes(400, 5)
    # One in ten is ten times as long as the others.
    x = x * np.where(np.arange(400) % 10 == 0, 10, 1)[:, None] / np.sqrt(10)
    optimum = problems.logistic_optimum(x, y, 0.01)
    distances = {}
    for sampling in ("uniform", "lipschitz"):
        method = DistributedSaga(saga.logistic, 4, 20, 0.01, sampling=sampling)
        state = rounds(method, first_state(method, (x, y)), 100)
        distances[sampling] = problems.distance(state.params, optimum)
    assert distances["lipschitz"] < 1e-8
    assert distances["uniform"] > 1e-5
    # Steps are no longer than the samples' curvatures, divided by these factors, allow.
    p = 0.25 * np.sum(x.reshape(4, 100, 5) ** 2, axis=2)
    factors = (p + 100 * 0.01 / 3) / np.mean(p + 100 * 0.01 / 3, axis=1, keepdims=True)
    np.testing.assert_allclose(state.step_size, 1 / (3 * (np.max(p / factors) + 0.01)), rtol=1e-12)


def smoothness(x, ridge):
    return 0.25 * np.max(np.sum(x**2, axis=1)) + ridge


@pytest.mark.parametrize("machines", [1, 4, 16])
@pytest.mark.long
def test_the_bound_of_saga_holds_with_a_period_of_one(machines):
    n, ridge = 256, 0.05
    data = problems.classes(n, 5)
    optimum = problems.logistic_optimum(*data, ridge)
    method = DistributedSaga(saga.logistic, machines, 1, ridge)
    state, largest = first_state(method, data), smoothness(data[0], ridge)
    mu = ridge
    gap = problems.logistic_objective(np.zeros(5), *data, ridge) - problems.logistic_objective(optimum, *data, ridge)
    start = optimum @ optimum + 2 * (n / machines) / (3 * largest) * gap
    epoch = n // machines
    distances = []
    for seed in range(20):
        _, history = method.run(
            state, jax.random.key(seed), 12 * epoch, every=epoch, evaluate=lambda w: w, progress=False
        )
        distances.append(np.sum((history.values - optimum) ** 2, axis=1))
    steps = np.arange(13) * epoch
    bound = (1 - min(machines / (4 * n), mu / (3 * largest))) ** steps * start
    assert (np.mean(distances, axis=0) <= bound).all()


def slope_per_epoch(history, optimum):
    distances = np.log(np.sum((history.values - optimum) ** 2, axis=1))
    is_above_rounding = distances > np.log(1e-26)
    line = stats.linregress(history.epochs[is_above_rounding], distances[is_above_rounding])
    return line.slope, line.rvalue**2


def test_machines_that_differ_converge_linearly():
    n, machines, period, ridge = 2048, 8, 16, 1e-2
    data = problems.classes(n, 20)
    optimum = problems.logistic_optimum(*data, ridge)
    method = DistributedSaga(saga.logistic, machines, period, ridge)
    every = n // (machines * period)
    state, history = method.run(
        first_state(method, data), KEY, 40 * every, every=every, evaluate=lambda w: w, progress=False
    )
    slope, r2 = slope_per_epoch(history, optimum)
    assert slope <= -0.6
    assert r2 >= 0.95
    assert problems.distance(state.params, optimum) <= 1e-12


@pytest.mark.parametrize(
    "control",
    [
        DistributedSaga(saga.logistic, 8, 16, 1e-2, "local"),
        saga.FederatedAveraging(saga.logistic, 8, 16, 1e-2),
    ],
    ids=["local SAGA", "FedAvg"],
)
def test_methods_without_correction_do_not_converge_where_machines_differ(control):
    data = problems.classes(2048, 20)
    optimum = problems.logistic_optimum(*data, 1e-2)
    assert problems.distance(rounds(control, first_state(control, data), 640).params, optimum) > 1e-3


@pytest.mark.long
def test_longer_periods_need_fewer_rounds_where_machines_have_similar_samples():
    n, machines, ridge = 2048, 8, 1e-2
    data = problems.shuffle(problems.classes(n, 20))
    optimum = problems.logistic_optimum(*data, ridge)
    rounds_needed = []
    for period in (1, 16, 64, n // machines):
        method = DistributedSaga(saga.logistic, machines, period, ridge)
        every = max(1, 32 // period)
        _, history = method.run(
            first_state(method, data),
            KEY,
            40 * n // (machines * period),
            every=every,
            evaluate=lambda w: w,
            progress=False,
        )
        ratio = np.sum((history.values - optimum) ** 2, axis=1) / np.sum(optimum**2)
        assert ratio[-1] <= 1e-8
        rounds_needed.append(history.rounds[np.argmax(ratio <= 1e-8)])
    assert np.all(np.diff(rounds_needed) < 0)


@pytest.mark.long
def test_long_periods_on_quadratics_contract_as_the_round_map_says():
    rng = np.random.default_rng(3)
    machines, size, d, ridge = 3, 40, 4, 0.3
    x = rng.normal(size=(machines, size, d)) * np.array([1.0, 0.6, 1.5])[:, None, None]
    y = rng.normal(size=(machines, size))
    hessians = np.einsum("kmi,kmj->kij", x, x) / size
    data = x.reshape(-1, d), y.reshape(-1)
    optimum = problems.squares_optimum(*data, ridge)
    for correction, theta in (("anchored", 1.0), ("own", 1 / machines)):
        # If every machine converges within a round, its parameters after a round are a linear function of all machines'
        # parameters after the round before, of which the tables hold the gradients.
        inverse = np.linalg.inv(theta * hessians + ridge * np.eye(d))
        blocks = [
            [inverse[k] @ (theta * hessians[k] * (k == i) - hessians[i] / machines) for i in range(machines)]
            for k in range(machines)
        ]
        radius = max(abs(np.linalg.eigvals(np.block(blocks))))
        method = DistributedSaga(saga.squared, machines, 5000, ridge, correction)
        _, history = method.run(first_state(method, data), KEY, 40, evaluate=lambda w: w, progress=False)
        distances = np.linalg.norm(history.values - optimum, axis=1)
        ratio = (distances[40] / distances[30]) ** (1 / 10)
        assert ratio == pytest.approx(radius, rel=0.05), correction


@pytest.mark.long
def test_steps_fall_with_the_number_of_machines():
    n, ridge = 2048, 1e-2
    data = problems.shuffle(problems.classes(n, 20))
    optimum = problems.logistic_optimum(*data, ridge)
    steps = {}
    for machines in (1, 2, 4, 8, 16):
        method = DistributedSaga(saga.logistic, machines, 16, ridge)
        counts = []
        for seed in range(3):
            _, history = method.run(
                first_state(method, data),
                jax.random.key(seed),
                60 * n // (machines * 16),
                every=4,
                evaluate=lambda w: w,
                progress=False,
            )
            ratio = np.sum((history.values - optimum) ** 2, axis=1) / np.sum(optimum**2)
            counts.append(16 * history.rounds[np.argmax(ratio <= 1e-10)])
        steps[machines] = np.mean(counts)
    for machines, count in steps.items():
        assert steps[1] / count >= 0.8 * machines, steps
