"""Workers that are processes: killed, stopped, wrong, many requests at once, and nothing left at the end."""

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
    # Who failed in the test before may be about to rest: what a request leaves behind is seen after the next.
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
    mine = listening_addresses(is_in_cluster)
    assert mine
    assert all(address.is_loopback for address in mine), mine


def is_in_cluster(process, command):
    import ray  # after the pool has: it reads its environment then

    return ray._private.worker._global_node.session_name in command or command.startswith("ray::")


@pytest.mark.parametrize("wrong", ["raise", "NaN", "shape", "dtype"])
def test_wrong_answers_do_not_count(pool, faults, wrong):
    faults.set_behaviour(wrong, 2)
    responses = pool.run(BATCH, stop.answers(N), time_limit=LIMIT)
    assert responses.returned.all()  # another worker did it
    check(responses)
    (fault,) = responses.faults
    assert (fault.worker, fault.kind) == (2, "raised" if wrong == "raise" else "refused")
    if wrong == "raise":
        assert fault.message == "OSError: no disk"


def test_workers_killed_during_a_request_are_done_without_and_come_back(pool, faults):
    before = pool.counters()
    faults.set_behaviour("wait 1", *range(N))
    threading.Timer(0.2, faults.kill, [1, 4]).start()
    responses = pool.run(BATCH, stop.answers(N), time_limit=LIMIT)
    assert responses.returned.all()  # others did their part
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
    began = time.monotonic()
    try:
        for scale in (1, 2, 3):
            responses = pool.run(np.float32(scale) * BATCH, stop.answers(4), time_limit=LIMIT)
            assert responses.returned.sum() >= 4
            assert responses.seconds < 5
            check(responses, np.float32(scale))
        time.sleep(max(0.0, 10 - (time.monotonic() - began)))
    finally:
        faults.signal(signal.SIGCONT, 0, 3)
    wait_until(lambda: pool.states() == ["idle"] * N)
    assert pool.counters()["late"] >= 2
    check(pool.run(BATCH, stop.answers(N), time_limit=LIMIT))


def test_with_all_workers_dead_the_truth_is_told_in_time(pool, faults):
    faults.set_behaviour("wait 5", *range(N))
    threading.Timer(0.2, faults.kill, range(N)).start()
    began = time.monotonic()
    with pytest.raises(pools.NotEnoughAnswers, match=r"0 of 6 answers .* within 1 s.* died: "):
        pool.run(BATCH, stop.answers(2), time_limit=1.0)
    assert time.monotonic() - began < 4
    faults.clear()
    check(pool.run(BATCH, stop.answers(N), time_limit=LIMIT))


@pytest.mark.long
def test_what_never_answers_is_replaced(tmp_path, pool):
    faults = FileFaults(tmp_path)
    with pools.RayPool(jnp.sin, 2, example=BATCH[0], interceptor=faults, stuck_after=5.0, progress=False) as two:
        two.run(BATCH[:2], stop.answers(2), time_limit=LIMIT)
        stuck = faults.pid(1)
        faults.set_behaviour("wait 1000", 1)
        assert returned_shares(two.run(BATCH[:2], stop.answers(1), time_limit=LIMIT)) == [0]
        wait_until(lambda: two.counters()["deaths"] == 1)
        faults.clear()
        wait_until(lambda: two.states() == ["idle"] * 2)
        assert two.run(BATCH[:2], stop.answers(2), time_limit=LIMIT).returned.all()
        assert faults.pid(1) != stuck


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)  # holds random keys
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return {"y": self.norm(self.dropout(self.linear(x))).astype(jnp.bfloat16)}


@pytest.mark.long
def test_models_arrive_whole(pool):
    model = Model(nnx.Rngs(0))
    with pools.RayPool(model, 2, progress=False) as two:
        values = two.run(BATCH[:2], stop.answers(2), time_limit=LIMIT).values
    model.eval()
    assert values["y"].dtype == jnp.bfloat16
    expected = np.asarray(model(jnp.asarray(BATCH[:2]))["y"], np.float32)
    np.testing.assert_allclose(values["y"].astype(np.float32), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.long
def test_workers_that_cannot_start_are_an_error_that_says_why(pool):
    class Wrong:
        def __reduce__(self):
            return _never, ()

    wrong = Wrong()
    with pytest.raises(RuntimeError, match="no worker could be started") as caught:
        pools.RayPool(lambda x: x + (wrong is None), 2, progress=False)
    assert "not here" in str(caught.value.__cause__)


def _never():
    raise ValueError("not here")


@pytest.mark.long
def test_closing_during_a_request_says_so_and_leaves_nothing(tmp_path, pool):
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
    store = _store()
    with pools.RayPool(f, 8, example=np.zeros((2, 3), np.float32), interceptor=faults, progress=False) as eight:
        server = CodedServer(code, eight, stop.answers(5) | stop.deadline(0.15), time_limit=limit)
        for batch in batches[:2]:
            server.warm_up(batch)
            server(batch)
        threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
        todo, done, late, over = iter(range(requests)), [], [], threading.Event()

        def client():
            while (i := _next(todo, lock)) is not None:
                began = time.monotonic()
                try:
                    answer = server(batches[i])
                    wrong = np.sqrt(np.mean((answer.values - truth[i]) ** 2, axis=1))
                    done.append(np.mean(wrong > 4 * answer.error + 1e-5))
                except pools.NotEnoughAnswers:
                    done.append(None)
                if time.monotonic() - began > limit + 1:
                    late.append(i)
                over.wait(0.05)

        def killer():
            while not over.wait(1.0):
                victim = int(rng.integers(8))
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it is being started anew
                    faults.kill(victim)

        lock = threading.Lock()
        # Daemons, and told that it is over whatever happens: a failure here must not keep the process from ending.
        running = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
        killing = threading.Thread(target=killer, daemon=True)
        for thread in (killing, *running):
            thread.start()
        try:
            for thread in running:
                thread.join(300)
                assert not thread.is_alive()
        finally:
            over.set()
        killing.join()
        counters = server.counters()
        assert len(done) == requests
        assert not late
        assert counters["answered"] + counters["refused"] == requests + 2
        assert counters["workers"]["deaths"] > 2
        answered = [share for share in done if share is not None]
        assert len(answered) > 0.9 * requests
        assert np.mean(answered) <= 0.01
        wait_until(lambda: eight.states() == ["idle"] * 8)
        assert set(threading.enumerate()) <= threads
        pids = [faults.pid(worker) for worker in range(8)]
        server.close()
    wait_until(lambda: not any(map(is_ray_worker, pids)))
    wait_until(lambda: _store() >= store - 2**16)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)


def _next(todo, lock):
    with lock:
        return next(todo, None)


def _store():
    """Bytes that are free in the cluster's object store."""
    import ray

    return ray.available_resources()["object_store_memory"]
