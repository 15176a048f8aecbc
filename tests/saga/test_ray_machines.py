"""Tests machines that are processes: the same results, and the handling of late, dead and faulty ones."""

import dataclasses
import signal
import time
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import saga
from jaxcode.saga import DistributedSaga, RayMachines, ray_machines

from ..pools.faults import FileFaults, is_ray_worker, wait_until
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
    """Replaces a machine's work by what a file of its number says."""

    def __init__(self, folder):
        self.files = FileFaults(folder)
        self.folder = folder

    def __call__(self, machine, work):
        return self.files(machine, lambda batch: self.damage_answer(machine, work()), None)

    def damage_answer(self, machine, answer):
        """Replaces all numbers of an answer by NaN, or only those of the local state."""
        file = self.folder / f"damage{machine}"
        damage = file.read_text() if file.exists() else ""
        update, local, message = answer
        if damage == "all":
            update, message = jnp.nan * update, jnp.nan * message
        if damage:
            local = {**local, "table": jnp.nan * local["table"]}
        return update, local, message

    def set_damage(self, damage, *machines):
        for machine in machines:
            (self.folder / f"damage{machine}").write_text(damage)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with jax.enable_x64(True):
        faults = Faults(tmp_path_factory.mktemp("faults"))
        with RayMachines(METHOD, deadline=1.0, time_limit=60.0, interceptor=faults) as machines:
            yield machines, faults


def settle(machines):
    """Waits until all machines are idle, also those that are restarted."""
    assert machines._wait_until(lambda: set(machines._supervisor.states()) == {"idle"}, time.monotonic() + 60.0)


@pytest.mark.long
def test_processes_give_the_methods_results_and_resume(shared, tmp_path, monkeypatch):
    machines, _ = shared
    monkeypatch.setattr(machines, "_deadline", None)
    expected, _ = METHOD.run(METHOD.init(jnp.zeros(5), DATA), KEY, 6, progress=False)
    state = machines.init(jnp.zeros(5), DATA)
    state, history = machines.run(state, KEY, 4, every=2, checkpoint=tmp_path, progress=False)
    assert history.rounds.tolist() == [0, 2, 4]
    # With new machines, the run resumes from the checkpoint.
    state, history = machines.run(
        machines.init(jnp.zeros(5), DATA), KEY, 6, every=2, checkpoint=tmp_path, progress=False
    )
    assert history.rounds.tolist() == [4, 6]
    np.testing.assert_allclose(state.params, expected.params, rtol=1e-10)
    np.testing.assert_allclose(state.messages, expected.messages, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(history.values[-1], METHOD.objective(expected.params, expected), rtol=1e-12)


@pytest.mark.long
def test_rounds_go_on_without_late_dead_stuck_and_failing_machines_which_rejoin(shared, monkeypatch):
    machines, faults = shared[0], shared[1].files
    optimum = problems.logistic_optimum(*DATA, RIDGE)
    state = machines.init(jnp.zeros(5), DATA)
    for _ in range(3):
        state = machines.round(state, KEY)
        settle(machines)
    # A late machine: its update is discarded; its table changes, which its next message includes.
    faults.set_behaviour("wait 3", 1)
    before = state.messages[1]
    state = machines.round(state, KEY)
    np.testing.assert_array_equal(state.messages[1], before)
    faults.set_behaviour("", 1)
    settle(machines)
    state = machines.round(state, KEY)
    assert (state.messages[1] != before).any()
    # A machine that raises: it misses the round.
    faults.set_behaviour("raise", 2)
    before = state.messages[2]
    state = machines.round(state, KEY)
    np.testing.assert_array_equal(state.messages[2], before)
    faults.set_behaviour("", 2)
    # A dead machine: restarted with gradients at the current parameters.
    faults.kill(0)
    state = machines.round(state, KEY)
    settle(machines)
    # A stuck machine: replaced after the time limit.
    monkeypatch.setattr(machines._supervisor, "_stuck_after", 2.0)
    stuck_pid = faults.pid(1)
    faults.signal(signal.SIGSTOP, 1)
    state = machines.round(state, KEY)
    settle(machines)
    monkeypatch.undo()
    state = machines.round(state, KEY)
    assert faults.pid(1) != stuck_pid
    for _ in range(250):
        state = machines.round(state, KEY)
    np.testing.assert_allclose(state.message_sum, np.sum(state.messages, axis=0), atol=1e-12)
    assert problems.distance(state.params, optimum) < 1e-12


@pytest.mark.long
def test_errors_name_the_failures_if_no_machine_answers(shared):
    machines, faults = shared[0], shared[1].files
    state = machines.round(machines.init(jnp.zeros(5), DATA), KEY)
    settle(machines)  # the first round compiles, and may take machines longer than the deadline
    faults.set_behaviour("raise", 0, 1, 2)
    try:
        with pytest.raises(saga.NoMachines, match=r"round 1: machine 0 raised OSError: no disk; machine 1 raised"):
            machines.round(state, KEY)
    finally:
        faults.set_behaviour("", 0, 1, 2)
    machines.round(state, KEY)


@pytest.mark.long
def test_a_machine_that_keeps_raising_is_restarted(shared):
    machines, faults = shared[0], shared[1].files
    state = machines.round(machines.init(jnp.zeros(5), DATA), KEY)
    settle(machines)
    process = faults.pid(1)
    faults.set_behaviour("raise", 1)
    try:
        for _ in range(3):
            state = machines.round(state, KEY)
            assert np.isfinite(state.params).all()
        wait_until(lambda: machines._supervisor.counters()["restarts"] == 1)
    finally:
        faults.set_behaviour("", 1)
    settle(machines)
    machines.round(state, KEY)
    wait_until(lambda: faults.pid(1) != process)


@pytest.mark.long
@pytest.mark.parametrize("damage", ["all", "table"])
def test_machines_that_send_nan_have_not_answered(shared, damage):
    machines, faults = shared
    state = machines.round(machines.init(jnp.zeros(5), DATA), KEY)
    settle(machines)
    faults.set_damage(damage, 1)
    try:
        for _ in range(3):
            # An answer to an earlier round may have come after it.
            before = machines._messages[1].copy()
            state = machines.round(state, KEY)
            np.testing.assert_array_equal(state.messages[1], before)
            chex.assert_tree_all_finite((state.params, state.messages))
        # If all do so, the run has diverged.
        faults.set_damage(damage, 0, 2)
        with pytest.raises(saga.DivergenceError, match="sent numbers that are not finite"):
            machines.round(state, KEY)
    finally:
        faults.set_damage("", 0, 1, 2)
    # Machines continue from their last finite tables.
    for _ in range(150):
        state = machines.round(state, KEY)
    assert problems.distance(state.params, problems.logistic_optimum(*DATA, RIDGE)) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "is stopped"])
@pytest.mark.parametrize("machine", [0, 2])
def test_checkpoints_survive_a_machine_that_fails_between_answer_and_save(
    shared, tmp_path, monkeypatch, number, machine
):
    machines, faults = shared[0], shared[1].files
    # After this time a machine that does not answer is restarted; the first round, which compiles, has no more.
    monkeypatch.setattr(machines, "_time_limit", 8.0)
    monkeypatch.setattr(machines, "_deadline", None)
    monkeypatch.setattr(machines, "_start_limit", 60.0)
    state = machines.init(jnp.zeros(5), DATA)
    state = machines.round(state, KEY)
    settle(machines)
    collect, failed = machines._collect, []

    def fail_first(state):
        if not failed:
            failed.append(faults.pid(machine))
            faults.signal(number, machine)
        return collect(state)

    monkeypatch.setattr(machines, "_collect", fail_first)
    state, history = machines.run(state, KEY, 4, every=2, checkpoint=tmp_path, progress=False)
    assert history.rounds.tolist() == [1, 3, 5]
    assert sorted(int(folder.name) for folder in tmp_path.iterdir()) == [3, 5]
    monkeypatch.setattr(machines, "_collect", collect)
    # The stored state is consistent: messages are the sums of tables.
    resumed, history = machines.run(
        machines.init(jnp.zeros(5), DATA), KEY, 5, every=2, checkpoint=tmp_path, progress=False
    )
    assert history.rounds.tolist() == [5]
    np.testing.assert_array_equal(resumed.messages, state.messages)
    stored = machines._collect(resumed)
    x, ends = DATA[0], np.cumsum(METHOD.shard_sizes)
    for k, (size, end) in enumerate(zip(METHOD.shard_sizes, ends, strict=True)):
        np.testing.assert_allclose(
            stored.messages[k], x[end - size : end].T @ stored.local["table"][k][:size], atol=1e-12
        )


@pytest.mark.long
def test_machines_that_die_while_a_checkpoint_is_restored_start_from_it(shared, tmp_path, monkeypatch):
    machines, faults = shared[0], shared[1].files
    monkeypatch.setattr(machines, "_deadline", None)
    state = machines.init(jnp.zeros(5), DATA)
    state, _ = machines.run(state, KEY, 3, every=3, checkpoint=tmp_path, progress=False)
    stored = machines._collect(state)
    state = machines.init(jnp.zeros(5), DATA)
    state = machines.round(state, KEY)
    settle(machines)
    distribute = machines._distribute

    def die_first(state):
        faults.kill(1)
        return distribute(state)

    monkeypatch.setattr(machines, "_distribute", die_first)
    state, _ = machines.run(state, KEY, 1, every=3, checkpoint=tmp_path, progress=False)
    settle(machines)
    chex.assert_trees_all_equal(machines._collect(state).local, stored.local)


@pytest.mark.long
def test_divergence_raises(shared):
    machines, _ = shared
    method = dataclasses.replace(METHOD, loss=saga.squared, step_size=1e4)
    original, machines.method = machines.method, method
    try:
        with pytest.raises(saga.DivergenceError, match="take shorter steps"):
            machines.run(machines.init(jnp.zeros(5), DATA), KEY, 60, progress=False)
    finally:
        machines.method = original


@pytest.mark.long
def test_closing_leaves_no_processes(shared):
    machines, faults = shared[0], shared[1].files
    machines.round(machines.init(jnp.zeros(5), DATA), KEY)
    pids = [faults.pid(machine) for machine in range(3)]
    machines.close()
    machines.close()
    wait_until(lambda: not any(map(is_ray_worker, pids)))


def test_rounds_before_init_are_refused(monkeypatch):
    monkeypatch.setattr(ray_machines, "connect", lambda address: mock.Mock())
    machines = RayMachines(METHOD)
    state = METHOD.init(jnp.zeros(5), DATA)
    for compute in (machines.round, lambda *arguments: machines.run(*arguments, 3, progress=False)):
        with pytest.raises(RuntimeError, match="no machines have been started; call init first"):
            compute(state, KEY)


def test_settings_that_make_no_sense_are_refused(unchecked):
    from jax.sharding import Mesh

    on_mesh = DistributedSaga(saga.logistic, 2, 5, mesh=Mesh(np.array(jax.devices()[:2]), ("machines",)))
    with pytest.raises(ValueError, match=r"method\.mesh is given"):
        RayMachines(on_mesh)
    with pytest.raises(ValueError, match="deadline is 0"):
        RayMachines(METHOD, deadline=0)
