"""Tests workers that are processes: killed, stopped or faulty, under load, and none left at the end."""

import contextlib
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcode import SplineCode, pools, stop

from .faults import FileFaults, is_ray_worker, listening_addresses, returned_shares, wait_until

N = 6
BATCH = np.arange(N * 2 * 3, dtype=np.float32).reshape(N, 2, 3) / 10
LIMIT = 60.0


@pytest.fixture(scope="module")
def _shared(tmp_path_factory):
    faults = FileFaults(tmp_path_factory.mktemp("faults"))
    with pools.RayPool(jnp.sin, N, example=BATCH[0], interceptor=faults, progress=False) as pool:
        pool.run(BATCH, stop.answers(N), time_limit=LIMIT)
        yield pool, faults


@pytest.fixture
def faults(_shared):
    _shared[1].clear()
    return _shared[1]


@pytest.fixture
def pool(_shared, faults):
    pool = _shared[0]
    # A worker that failed in the last request of the test before may be quarantined only during this one.
    pool.run(BATCH, stop.answers(N), time_limit=LIMIT)
    wait_until(lambda: pool.states() == ["idle"] * N)
    return pool


def check(responses, scale=1):
    expected = np.where(responses.returned[:, None, None], np.sin(scale * BATCH), 0)
    np.testing.assert_allclose(responses.values, expected, rtol=1e-5, atol=1e-6)


def test_every_worker_answers_and_listens_to_this_machine_only(pool):
    responses = pool.run(BATCH, stop.answers(N), time_limit=LIMIT)
    assert responses.returned.all()
    check(responses)
    addresses = listening_addresses(is_in_cluster)
    assert addresses
    assert all(address.is_loopback for address in addresses), addresses


def is_in_cluster(process, command):
    import ray  # after the pool has imported it, which sets the environment that Ray reads then

    return ray._private.worker._global_node.session_name in command or command.startswith("ray::")


@pytest.mark.parametrize("behaviour", ["raise", "NaN", "shape", "dtype"])
def test_invalid_answers_do_not_count(pool, faults, behaviour):
    faults.set_behaviour(behaviour, 2)
    responses = pool.run(BATCH, stop.answers(N), time_limit=LIMIT)
    assert responses.returned.all()  # another worker computed it
    check(responses)
    (fault,) = responses.faults
    assert (fault.worker, fault.kind) == (2, "raised" if behaviour == "raise" else "invalid")
    if behaviour == "raise":
        assert fault.message == "OSError: no disk"


def test_workers_killed_during_a_request_are_replaced_and_others_compute_their_shares(pool, faults):
    before = pool.counters()
    faults.set_behaviour("wait 1", *range(N))
    threading.Timer(0.2, faults.kill, [1, 4]).start()
    responses = pool.run(BATCH, stop.answers(N), time_limit=LIMIT)
    assert responses.returned.all()  # others computed their shares
    assert responses.seconds < 10
    check(responses)
    assert sorted((fault.worker, fault.kind) for fault in responses.faults) == [(1, "died"), (4, "died")]
    faults.clear()
    wait_until(lambda: pool.states() == ["idle"] * N)
    assert pool.run(2 * BATCH, stop.answers(N), time_limit=LIMIT).returned.all()
    assert pool.counters()["deaths"] == before["deaths"] + 2
    assert pool.counters()["restarts"] == before["restarts"] + 2


def test_workers_that_are_stuck_are_skipped_and_rejoin(pool, faults):
    faults.signal(signal.SIGSTOP, 0, 3)
    start = time.monotonic()
    try:
        for scale in (1, 2, 3):
            responses = pool.run(np.float32(scale) * BATCH, stop.answers(4), time_limit=LIMIT)
            assert responses.returned.sum() >= 4
            assert responses.seconds < 5
            check(responses, np.float32(scale))
        time.sleep(max(0.0, 10 - (time.monotonic() - start)))
    finally:
        faults.signal(signal.SIGCONT, 0, 3)
    wait_until(lambda: pool.states() == ["idle"] * N)
    assert pool.counters()["late"] >= 2
    check(pool.run(BATCH, stop.answers(N), time_limit=LIMIT))


def test_with_all_workers_dead_a_request_is_refused_at_its_time_limit(pool, faults):
    faults.set_behaviour("wait 30", *range(N))
    threading.Timer(0.2, faults.kill, range(N)).start()
    start = time.monotonic()
    # On a busy machine Ray takes seconds to tell that a worker died.
    with pytest.raises(pools.NotEnoughAnswers, match=r"0 of 6 answers .* within 6 s.* died: "):
        pool.run(BATCH, stop.answers(2), time_limit=6.0)
    assert time.monotonic() - start < 12
    faults.clear()
    check(pool.run(BATCH, stop.answers(N), time_limit=LIMIT))


@pytest.mark.long
def test_a_worker_that_never_answers_is_replaced(tmp_path, pool):
    faults = FileFaults(tmp_path)
    with pools.RayPool(jnp.sin, 2, example=BATCH[0], interceptor=faults, stuck_after=5.0, progress=False) as two:
        two.run(BATCH[:2], stop.answers(2), time_limit=LIMIT)
        stuck_pid = faults.pid(1)
        faults.set_behaviour("wait 1000", 1)
        assert returned_shares(two.run(BATCH[:2], stop.answers(1), time_limit=LIMIT)) == [0]
        wait_until(lambda: two.counters()["deaths"] == 1)
        faults.clear()
        wait_until(lambda: two.states() == ["idle"] * 2)
        assert two.run(BATCH[:2], stop.answers(2), time_limit=LIMIT).returned.all()
        assert faults.pid(1) != stuck_pid


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)  # holds random keys
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return {"y": self.norm(self.dropout(self.linear(x))).astype(jnp.bfloat16)}


@pytest.mark.long
def test_models_keep_their_random_keys_and_statistics(pool):
    model = Model(nnx.Rngs(0))
    with pools.RayPool(model, 2, progress=False) as two:
        values = two.run(BATCH[:2], stop.answers(2), time_limit=LIMIT).values
    model.eval()
    assert values["y"].dtype == jnp.bfloat16
    expected = np.asarray(model(jnp.asarray(BATCH[:2]))["y"], np.float32)
    np.testing.assert_allclose(values["y"].astype(np.float32), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.long
def test_a_pool_whose_workers_cannot_start_raises_with_the_cause(pool):
    class Unpicklable:
        def __reduce__(self):
            return _raise_on_load, ()

    unpicklable = Unpicklable()
    with pytest.raises(RuntimeError, match="no worker could be started") as caught:
        pools.RayPool(lambda x: x + (unpicklable is None), 2, progress=False)
    assert "not here" in str(caught.value.__cause__)


def _raise_on_load():
    raise ValueError("not here")


@pytest.mark.long
def test_closing_ends_a_request_and_leaves_no_process_or_thread(tmp_path, pool):
    faults = FileFaults(tmp_path)
    threads = set(threading.enumerate())
    two = pools.RayPool(jnp.sin, 2, interceptor=faults, progress=False)
    two.run(BATCH[:2], stop.answers(2), time_limit=LIMIT)
    faults.set_behaviour("wait 1000", 0, 1)
    threading.Timer(0.3, two.close).start()
    with pytest.raises(pools.PoolClosed):
        two.run(BATCH[:2], stop.answers(2), time_limit=LIMIT)
    wait_until(lambda: not any(is_ray_worker(faults.pid(worker)) for worker in range(2)))
    wait_until(
        lambda: not [t for t in set(threading.enumerate()) - threads if "jaxcode" in t.name or "Timer" in t.name]
    )


@pytest.mark.long
def test_many_requests_while_workers_are_killed_are_answered_or_refused(tmp_path, pool):
    """Five hundred requests from eight clients; every second a worker is killed."""
    from jaxcode import CodedServer

    code, faults, clients, requests, limit = SplineCode.systematic(4, 8), FileFaults(tmp_path), 8, 500, 10.0
    rng = np.random.default_rng(0)

    def f(x):
        return jnp.sin(x @ jnp.linspace(0.2, 0.7, 3 * 1300).reshape(3, -1))

    # Answers to one in ten are so long that they go through the object store.
    sizes = [80 if i % 10 == 0 else 8 for i in range(requests)]
    batches = [np.sort(rng.normal(size=(size, 3)), axis=0).astype(np.float32) for size in sizes]
    compiled = jax.jit(f)
    truth = [np.asarray(compiled(batch)) for batch in batches]
    free_bytes = _free_store_bytes()
    with pools.RayPool(f, 8, example=np.zeros((2, 3), np.float32), interceptor=faults, progress=False) as eight:
        server = CodedServer(code, eight, stop.answers(5) | stop.deadline(0.15), time_limit=limit)
        for batch in batches[:2]:
            server.warm_up(batch)
            server(batch)
        threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
        # For each answered request, the fraction of results whose error exceeds the prediction; None if refused.
        numbers, outcomes, late, end = iter(range(requests)), [], [], threading.Event()

        def client():
            while (i := _next(numbers, lock)) is not None:
                start = time.monotonic()
                try:
                    prediction = server(batches[i])
                    error = np.sqrt(np.mean((prediction.values - truth[i]) ** 2, axis=1))
                    outcomes.append(np.mean(error > 4 * prediction.error + 1e-5))
                except pools.NotEnoughAnswers:
                    outcomes.append(None)
                if time.monotonic() - start > limit + 1:
                    late.append(i)
                end.wait(0.05)

        def killer():
            while not end.wait(1.0):
                worker = int(rng.integers(8))
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it is being restarted
                    faults.kill(worker)

        lock = threading.Lock()
        # Daemons, for which `end` is set in any case: a failure here must not keep the process from ending.
        client_threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
        killer_thread = threading.Thread(target=killer, daemon=True)
        for thread in (killer_thread, *client_threads):
            thread.start()
        try:
            for thread in client_threads:
                thread.join(300)
                assert not thread.is_alive()
        finally:
            end.set()
        killer_thread.join()
        counters = server.counters()
        assert len(outcomes) == requests
        assert not late
        assert counters["answered"] + counters["refused"] == requests + 2
        assert counters["workers"]["deaths"] > 2
        exceedances = [fraction for fraction in outcomes if fraction is not None]
        assert len(exceedances) > 0.9 * requests
        assert np.mean(exceedances) <= 0.01
        wait_until(lambda: eight.states() == ["idle"] * 8)
        assert set(threading.enumerate()) <= threads
        pids = [faults.pid(worker) for worker in range(8)]
        server.close()
    wait_until(lambda: not any(map(is_ray_worker, pids)))
    wait_until(lambda: _free_store_bytes() >= free_bytes - 2**16)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)


def _next(numbers, lock):
    with lock:
        return next(numbers, None)


def _free_store_bytes():
    """Returns how many bytes are free in the cluster's object store."""
    import ray

    return ray.available_resources()["object_store_memory"]
