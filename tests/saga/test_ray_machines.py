"""Machines that are processes: the same results, and what becomes of those that are late or die."""

import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import saga
from jaxcode.saga import DistributedSaga, RayMachines

from ..pools.faults import FileFaults, alive_in_ray, until
from . import problems

KEY = jax.random.key(0)
DATA = problems.classes(120, 5)
RIDGE = 0.05
METHOD = DistributedSaga(saga.logistic, 3, 16, RIDGE, shard_sizes=(30, 50, 40))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Faults:
    """What a machine does in place of working, as a worker in place of computing."""

    def __init__(self, folder):
        self.files = FileFaults(folder)

    def __call__(self, machine, work):
        return self.files(machine, lambda batch: work(), None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with jax.enable_x64(True):
        faults = Faults(tmp_path_factory.mktemp("faults"))
        with RayMachines(METHOD, deadline=1.0, time_limit=60.0, around=faults) as machines:
            yield machines, faults.files


def settle(machines):
    machines._receive(60.0, lambda: not machines._pending)


@pytest.mark.long
def test_processes_do_what_the_method_does_and_what_is_interrupted_goes_on(shared, tmp_path, monkeypatch):
    machines, _ = shared
    monkeypatch.setattr(machines, "_deadline", None)
    expected, _ = METHOD.run(METHOD.init(jnp.zeros(5), DATA), KEY, 6, progress=False)
    state = machines.init(jnp.zeros(5), DATA)
    state, history = machines.run(state, KEY, 4, every=2, checkpoint=tmp_path, progress=False)
    assert history.rounds.tolist() == [0, 2, 4]
    # From the beginning again, with other machines: it goes on where the checkpoint is.
    state, history = machines.run(
        machines.init(jnp.zeros(5), DATA), KEY, 6, every=2, checkpoint=tmp_path, progress=False
    )
    assert history.rounds.tolist() == [4, 6]
    np.testing.assert_allclose(state.params, expected.params, rtol=1e-10)
    np.testing.assert_allclose(state.messages, expected.messages, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(history.values[-1], METHOD.objective(expected.params, expected), rtol=1e-12)


@pytest.mark.long
def test_late_dead_stuck_and_failing_machines_are_done_without_and_rejoin(shared, monkeypatch):
    machines, faults = shared
    optimum = problems.logistic_optimum(*DATA, RIDGE)
    state = machines.init(jnp.zeros(5), DATA)
    for _ in range(3):
        state = machines.round(state, KEY)
        settle(machines)
    # Late: dropped for this round; its table moves and is told later.
    faults.tell("wait 3", 1)
    before = state.messages[1]
    state = machines.round(state, KEY)
    np.testing.assert_array_equal(state.messages[1], before)
    faults.tell("", 1)
    settle(machines)
    state = machines.round(state, KEY)
    assert (state.messages[1] != before).any()
    # Whoever raises has missed the round, no more.
    faults.tell("raise", 2)
    before = state.messages[2]
    state = machines.round(state, KEY)
    np.testing.assert_array_equal(state.messages[2], before)
    faults.tell("", 2)
    # Dead: begins anew with gradients of now.
    faults.kill(0)
    state = machines.round(state, KEY)
    assert machines._wait_for_idle(3, state, 60.0)
    # Stuck: replaced once the time limit has passed.
    monkeypatch.setattr(machines, "_time_limit", 2.0)
    stuck = faults.pid(1)
    faults.signal(signal.SIGSTOP, 1)
    state = machines.round(state, KEY)
    monkeypatch.undo()
    time.sleep(1.0)
    state = machines.round(state, KEY)
    assert machines._wait_for_idle(3, state, 60.0)
    state = machines.round(state, KEY)
    assert faults.pid(1) != stuck
    for _ in range(250):
        state = machines.round(state, KEY)
    np.testing.assert_allclose(state.message_sum, np.sum(state.messages, axis=0), atol=1e-12)
    assert problems.distance(state.params, optimum) < 1e-12


@pytest.mark.long
def test_the_truth_is_told_where_nobody_answers(shared):
    machines, faults = shared
    state = machines.round(machines.init(jnp.zeros(5), DATA), KEY)
    settle(machines)  # the first round compiles, and who took longer than the deadline is still at it
    faults.tell("raise", 0, 1, 2)
    try:
        with pytest.raises(saga.NoMachines, match=r"round 1: machine 0 raised OSError: no disk; machine 1 raised"):
            machines.round(state, KEY)
    finally:
        faults.tell("", 0, 1, 2)
    machines.round(state, KEY)


@pytest.mark.long
def test_closing_leaves_nothing(shared):
    machines, faults = shared
    machines.round(machines.init(jnp.zeros(5), DATA), KEY)
    pids = [faults.pid(machine) for machine in range(3)]
    machines.close()
    machines.close()
    until(lambda: not any(map(alive_in_ray, pids)))


def test_what_makes_no_sense_is_refused(unchecked):
    from jax.sharding import Mesh

    spread = DistributedSaga(saga.logistic, 2, 5, mesh=Mesh(np.array(jax.devices()[:2]), ("machines",)))
    with pytest.raises(ValueError, match=r"method\.mesh is given"):
        RayMachines(spread)
    with pytest.raises(ValueError, match="deadline is 0"):
        RayMachines(METHOD, deadline=0)
