"""Tests requests that no worker can compute, and many requests at the same time."""

import functools
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import pools, stop
from jaxcode.pools.event_loop import EventLoop

from .faults import Faults, wait_until

N = 5
BATCH = np.arange(N * 2 * 3, dtype=np.float32).reshape(N, 2, 3) / 10


def raise_if_negative(worker, compute, batch):
    if (batch < 0).any():
        raise OSError("no disk")
    return compute(batch)


@pytest.fixture(scope="module")
def pool():
    with pools.ThreadPool(jnp.exp, N, example=BATCH[0], interceptor=raise_if_negative) as pool:
        yield pool


def poisoned(share, value):
    batch = BATCH.copy()
    batch[share, 0, 0] = value
    return batch


POISONED = {
    "all overflow": np.full_like(BATCH, 200.0),
    "a NaN row in each": poisoned(slice(None), np.nan),
    "a NaN row in one": poisoned(2, np.nan),
    "all raise": np.full_like(BATCH, -1.0),
    "one raises": poisoned(2, -1.0),
}


@pytest.mark.parametrize("batch", POISONED.values(), ids=POISONED)
def test_a_request_that_every_worker_fails_at_is_refused_before_its_limit_and_no_worker_is_faulty(pool, batch):
    before = pool.counters()
    for _ in range(5):
        with pytest.raises(pools.NotEnoughAnswers, match=r"no worker is left.*worker \d (raised|invalid)"):
            pool.run(batch, stop.answers(N), can_decode=np.all, time_limit=60.0)
    wait_until(lambda: pool.states() == ["idle"] * N)
    assert pool.run(BATCH, stop.answers(N)).returned.all()
    after = pool.counters()
    assert (after["quarantines"], after["restarts"]) == (before["quarantines"], before["restarts"])


def test_a_pool_of_one_worker_refuses_a_request_that_it_fails_at():
    with pools.ThreadPool(jnp.exp, 1, example=BATCH[0]) as pool:
        with pytest.raises(pools.NotEnoughAnswers, match="no worker is left") as caught:
            pool.run(POISONED["all overflow"], stop.answers(N), time_limit=60.0)
        # It crosses processes, as an exception of a remote task does.
        copy = pickle.loads(pickle.dumps(caught.value))
        assert str(copy) == str(caught.value)
        assert copy.responses.faults == caught.value.responses.faults
        assert pool.run(BATCH, stop.answers(N)).returned.all()


def test_requests_that_fail_do_not_delay_another(pool):
    def fail(number):
        with pytest.raises(pools.NotEnoughAnswers, match="no worker is left"):
            pool.run(np.full_like(BATCH, 200.0 + number), stop.answers(N), time_limit=60.0)

    with ThreadPoolExecutor(9) as executor:
        failing = [executor.submit(fail, number) for number in range(8)]
        responses = executor.submit(pool.run, BATCH, stop.answers(N)).result(30)
        for future in failing:
            future.result(30)
    np.testing.assert_allclose(responses.values, np.exp(BATCH), rtol=1e-6)


def test_a_faulty_worker_is_quarantined_although_others_fail_at_another_share():
    faults = Faults()
    with pools.ThreadPool(jnp.exp, N, example=BATCH[0], interceptor=faults) as pool:
        faults.replace(3, lambda compute, batch: compute(batch) * np.nan)
        for _ in range(3):
            with pytest.raises(pools.NotEnoughAnswers, match="no worker is left"):
                pool.run(POISONED["a NaN row in one"], stop.answers(N), can_decode=np.all, time_limit=60.0)
            pool.run(BATCH, stop.answers(N))
        wait_until(lambda: pool.counters()["quarantines"] == 1)


CLIENTS = 100


def run_clients(again_after):
    """Counts the answered requests of many clients, where a share takes 10 ms; returns the pool's counters too."""

    def work(worker, compute, batch):
        time.sleep(0.01)
        return batch

    shares = np.ones((30, 1, 2), np.float32)
    with pools.ThreadPool(lambda x: x, 30, example=shares[0], interceptor=work) as pool:
        answered, barrier = [], threading.Barrier(CLIENTS)

        def client():
            barrier.wait(60)
            for _ in range(2):
                pool.run(shares, stop.answers(25), time_limit=60.0, can_decode=np.all, again_after=again_after)
                answered.append(1)

        clients = [threading.Thread(target=client, daemon=True) for _ in range(CLIENTS)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(120)
        return len(answered), pool.counters()


def test_hedging_loses_no_request_under_load(unchecked):
    """A hundred clients keep the workers busy for far longer than the time after which shares are overdue.

    Without the runtime type checker, which would take most of the time.
    """
    answered, counters = run_clients(again_after=0.15)
    assert answered == 2 * CLIENTS
    assert counters["answers"] == 2 * CLIENTS * 30


def test_an_overdue_share_is_assigned_to_an_idle_worker():
    faults, computed = Faults(), []

    def count(worker, compute, batch):
        computed.append(float(batch[0, 0]))
        return faults(worker, compute, batch)

    with pools.ThreadPool(lambda x: x, 2, example=np.zeros((1, 1), np.float32), interceptor=count) as pool:
        faults.block(0)
        wait_until(lambda: pool.states() == ["idle"] * 2)
        first = np.full((1, 1, 1), 1.0, np.float32)
        with ThreadPoolExecutor(2) as executor:
            # Worker 0, the first that is idle, is late with the only share of this request.
            responses = executor.submit(pool.run, first, stop.answers(1), again_after=0.05)
            assert responses.result(30).returned.all()
        assert computed.count(1.0) == 2
        faults.release()
        wait_until(lambda: pool.counters()["late"] == 1)


def test_pending_events_are_handled_before_timers():
    order, loop, is_blocked, gate = [], EventLoop("test"), threading.Event(), threading.Event()
    loop.post(lambda: is_blocked.set() or gate.wait(30))
    is_blocked.wait(30)
    loop.post(functools.partial(loop.call_later, 0.0, functools.partial(order.append, "timer")))
    for number in range(3):
        loop.post(functools.partial(order.append, number))
    gate.set()
    wait_until(lambda: len(order) == 4)
    loop.close()
    assert order == [0, 1, 2, "timer"]
    assert not loop.post(order.clear)
