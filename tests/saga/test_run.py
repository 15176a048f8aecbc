"""Tests runs: records, callbacks, divergence, machines that miss rounds, machines on devices."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxcode import saga, stragglers
from jaxcode.saga import DistributedSaga, FederatedAveraging, MinibatchSgd, Scaffold

from . import problems

KEY = jax.random.key(0)
DATA = problems.classes(256, 6)
RIDGE = 0.02
METHOD = DistributedSaga(saga.logistic, 8, 16, RIDGE)
METHODS = {
    "SAGA": METHOD,
    "SAGA, gradients": DistributedSaga(lambda w, s: jax.nn.softplus(-s[1] * (s[0] @ w)), 8, 16, RIDGE, step_size=1.0),
    "SGD": MinibatchSgd(saga.logistic, 8, 16, RIDGE),
    "FedAvg": FederatedAveraging(saga.logistic, 8, 16, RIDGE),
    "SCAFFOLD": Scaffold(saga.logistic, 8, 16, RIDGE),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def begin(method):
    return method.init(jnp.zeros(6), DATA)


@each_method
def test_single_rounds_and_two_runs_equal_one_run(method):
    state = begin(method)
    one_run, history = method.run(state, KEY, 6, every=4, progress=False)
    single_rounds = state
    for _ in range(6):
        single_rounds = method.round(single_rounds, KEY)
    two_runs = method.run(method.run(state, KEY, 3, progress=False)[0], KEY, 3, progress=False)[0]
    chex.assert_trees_all_equal(two_runs, one_run)
    np.testing.assert_allclose(single_rounds.params, one_run.params, rtol=1e-12)
    assert history.rounds.tolist() == [0, 4, 6]
    np.testing.assert_allclose(history.epochs, np.array([0, 4, 6]) * 8 * 16 / 256)
    floats = {"SAGA": 12, "SAGA, gradients": 12, "SGD": 6, "FedAvg": 6, "SCAFFOLD": 12}
    per_round = next(floats[name] for name, other in METHODS.items() if other is method)
    np.testing.assert_array_equal(history.floats, np.array([0, 4, 6]) * per_round)
    expected = [problems.logistic_objective(w, *DATA, RIDGE) for w in (np.zeros(6), np.asarray(one_run.params))]
    np.testing.assert_allclose(history.values[[0, -1]], expected, rtol=1e-12)


def run_to_divergence(method, params=None, evaluate=None):
    """Runs steps that are too long."""
    state = method.init(jnp.zeros(6) if params is None else params, DATA)
    return method.run(state, KEY, 200, every=4, evaluate=evaluate, progress=False)


@pytest.mark.parametrize("evaluate", [None, lambda w: w], ids=["objective", "evaluate"])
@pytest.mark.parametrize("kind", [DistributedSaga, FederatedAveraging, MinibatchSgd, Scaffold])
def test_divergence_raises_and_keeps_what_was_recorded(kind, evaluate):
    with pytest.raises(saga.DivergenceError, match="take shorter steps than step_size = 1e\\+03") as caught:
        run_to_divergence(kind(saga.squared, 8, 16, step_size=1e3), evaluate=evaluate)
    history = caught.value.history
    assert history.rounds[0] == 0
    assert len(history.rounds) >= 2
    assert len(history.values) == len(history.rounds)


def test_divergence_is_found_at_the_end_where_parameters_stay_finite():
    """Two rounds make the objective large, not infinite."""
    method = DistributedSaga(saga.squared, 8, 16, step_size=20.0)
    state = method.init(jnp.zeros(6), DATA)
    with pytest.raises(saga.DivergenceError, match="after 2 rounds the objective is"):
        method.run(state, KEY, 2, evaluate=lambda w: w[0], progress=False)


def test_a_start_that_is_far_from_the_optimum_or_perfect_is_no_divergence():
    x, _ = DATA
    method = DistributedSaga(saga.squared, 8, 16, RIDGE)
    for params, y in ((1e6 * jnp.ones(6), DATA[1]), (jnp.zeros(6), np.zeros(256)), (jnp.ones(6), x @ np.ones(6))):
        state, _ = method.run(method.init(params, (x, y)), KEY, 5, progress=False)
        chex.assert_tree_all_finite(state.params)


def test_a_start_that_is_not_finite_is_divergence():
    state = begin(METHOD)
    broken = dataclasses.replace(state, params=state.params.at[0].set(jnp.nan))
    with pytest.raises(saga.DivergenceError, match="after 0 rounds params are not finite"):
        METHOD.run(broken, KEY, 3, progress=False)


def test_evaluate_and_all_callbacks_are_called(capsys):
    called = []
    _, history = METHOD.run(
        begin(METHOD),
        KEY,
        4,
        every=2,
        evaluate=lambda w: {"length": jnp.linalg.norm(w), "w": w},
        callbacks=[lambda state, record: called.append(record["rounds"]), lambda state, record: called.append("two")],
    )
    assert called == [2, "two", 4, "two"]
    assert history.values["w"].shape == (3, 6)
    np.testing.assert_allclose(history.values["length"], np.linalg.norm(history.values["w"], axis=1))
    assert re.search(r"rounds: 100%.*4/4.*length=", capsys.readouterr().err)


def test_linear_rate_with_machines_that_miss_rounds():
    """Machines miss one round in five, at random: the rate stays linear."""
    optimum = problems.logistic_optimum(*DATA, RIDGE)

    def distances_and_rate(**settings):
        _, history = METHOD.run(begin(METHOD), KEY, 160, every=8, evaluate=lambda w: w, progress=False, **settings)
        distances = np.log(np.sum((history.values - optimum) ** 2, axis=1))
        return distances, np.polyfit(history.rounds, distances, 1)[0]

    _, rate = distances_and_rate()
    distances, rate_with_stragglers = distances_and_rate(stragglers=stragglers.Independent(0.2))
    assert distances[-1] < np.log(1e-13)
    assert rate_with_stragglers < 0.7 * rate


def test_a_machine_that_misses_rounds_keeps_its_table_and_its_message_counts():
    state = METHOD.run(begin(METHOD), KEY, 3, progress=False)[0]
    active = jnp.arange(8) != 2
    new_state = state
    for _ in range(2):
        new_state = METHOD.round(new_state, KEY, active)
    np.testing.assert_array_equal(new_state.messages[2], state.messages[2])
    np.testing.assert_array_equal(new_state.local["table"][2], state.local["table"][2])
    assert (np.asarray(new_state.local["table"]) != np.asarray(state.local["table"])).any(
        axis=1
    ).tolist() == active.tolist()
    np.testing.assert_allclose(new_state.message_sum, np.sum(new_state.messages, axis=0), atol=1e-12)
    # Garbage in the work of machines that are not active changes nothing.
    garbage = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), state.data.samples)
    broken = dataclasses.replace(state, data=dataclasses.replace(state.data, samples=garbage))
    damaged = METHOD.round(broken, KEY, active)
    np.testing.assert_array_equal(damaged.params, METHOD.round(state, KEY, active).params)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda leaf: leaf[2], damaged.local), jax.tree.map(lambda leaf: leaf[2], state.local)
    )
    unchanged = METHOD.round(state, KEY, jnp.zeros(8, bool))
    np.testing.assert_array_equal(unchanged.params, state.params)
    chex.assert_trees_all_equal(unchanged.local, state.local)


@each_method
@pytest.mark.parametrize("devices", [1, 4])
def test_machines_on_devices_do_the_same_with_one_sum_a_round(method, devices):
    on_devices = dataclasses.replace(method, mesh=Mesh(np.array(jax.devices()[:devices]), ("machines",)))
    active = jnp.arange(8) % 3 != 1
    distributed, single = begin(on_devices), begin(method)
    if devices > 1:
        compiled = jax.jit(lambda state: on_devices.round(state, KEY, active)).lower(distributed).compile().as_text()
        sums = re.findall(r"= \S+ all-reduce(?:-start)?\(", compiled)
        assert len(sums) == 1, sums
        size = on_devices.floats_per_round(distributed)
        assert re.search(rf"f64\[{size}\]\S* all-reduce", compiled), compiled
        assert not re.search("all-gather|all-to-all|collective-permute|reduce-scatter", compiled)
    for _ in range(3):
        distributed, single = on_devices.round(distributed, KEY, active), method.round(single, KEY, active)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-10, atol=1e-12),
        distributed,
        single,
    )


@each_method
def test_a_state_of_another_method_is_refused(method):
    fewer = begin(dataclasses.replace(method, num_machines=4))
    for call in (lambda: method.round(fewer, KEY), lambda: method.run(fewer, KEY, 1, progress=False)):
        with pytest.raises(ValueError, match="state is of 4 machines, but num_machines is 8"):
            call()
    by_length = begin(dataclasses.replace(METHOD, sampling="lipschitz"))
    with pytest.raises(ValueError, match=rf"but those of {type(method).__name__} have .*; expected a state that"):
        method.run(by_length, KEY, 1, progress=False)


def test_numbers_of_machines_that_devices_cannot_share_are_refused():
    with pytest.raises(ValueError, match="num_machines is 8, which 3 devices"):
        DistributedSaga(saga.logistic, 8, 16, mesh=Mesh(np.array(jax.devices()[:3]), ("machines",)))


def test_baselines_converge_as_their_papers_say():
    """With steps that decay all converge, FedAvg slowest; the drift of SCAFFOLD vanishes."""
    optimum = problems.logistic_optimum(*DATA, RIDGE)

    def final_distance(method, count):
        return problems.distance(method.run(begin(method), KEY, count, every=count, progress=False)[0].params, optimum)

    # With large minibatches there is little noise, and the drift remains.
    settings = {"step_size": 0.5, "batch_size": 400}
    assert final_distance(Scaffold(saga.logistic, 8, 16, RIDGE, **settings), 120) < 4e-4
    assert final_distance(FederatedAveraging(saga.logistic, 8, 16, RIDGE, **settings), 120) > 8e-4
    # Noise vanishes if steps decay.
    constant = MinibatchSgd(saga.logistic, 8, 16, RIDGE, step_size=1.0)
    decaying = dataclasses.replace(constant, decay=0.02)
    assert final_distance(decaying, 1500) < 0.5 * final_distance(constant, 1500)
