"""Tests pools while they start, warm up, replace workers and close."""

import functools
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import pools, stop
from jaxcode.pools.scheduler import Scheduler

from .faults import Faults, wait_until

N = 4
BATCH = np.arange(N * 2 * 3, dtype=np.float32).reshape(N, 2, 3)
OTHER = jax.ShapeDtypeStruct((7, 3), np.float32)


class SlowCompiler(pools.AbstractWorker):
    """Computes at once, except batches of seven rows: these are compiled for only when the test permits it.

    Args:
        compiling: Workers are appended that begin to compile for such batches; one list for all workers.
    """

    def __init__(self, compiling):
        self._compiling, self._pending = compiling, []

    def start(self):
        pass

    def warm_up(self, examples):
        return self._done_when_compiled(max((example.shape[0] for example in examples), default=0), None)

    def call(self, batch):
        return self._done_when_compiled(len(batch), np.sin(batch))

    def _done_when_compiled(self, rows, answer):
        future = Future()
        if rows == 7:
            self._pending.append((future, answer))
            self._compiling.append(self)
        else:
            future.set_result(answer)
        return future

    def permit(self):
        while self._pending:
            future, answer = self._pending.pop()
            future.set_result(answer)

    def close(self):
        pass

    def join(self, seconds):
        pass


class Compilers:
    """Holds a pool of such workers."""

    def __init__(self):
        self.compiling = []
        self.workers = [SlowCompiler(self.compiling) for _ in range(N)]
        self.pool = pools.WorkerPool(lambda _, x: jnp.sin(x), (), self.workers, BATCH[0])

    def permit(self):
        for worker in self.workers:
            worker.permit()


@pytest.fixture
def compilers():
    compilers = Compilers()
    with compilers.pool:
        yield compilers


def start_calls(*calls):
    """Starts calls on threads and returns their futures."""
    executor = ThreadPoolExecutor(len(calls))
    futures = [executor.submit(call) for call in calls]
    executor.shutdown(wait=False)
    return futures


def raise_for_seven_rows(x):
    def check(x):
        if len(x) == 7:
            raise OSError("no disk")
        return x

    return jax.pure_callback(check, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_warm_up_raises_for_a_batch_that_cannot_be_computed_and_restarted_workers_skip_it():
    faults = Faults()
    with pools.ThreadPool(raise_for_seven_rows, N, example=BATCH[0], interceptor=faults) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no worker could compute such a batch"):
                pool.warm_up(OTHER)
        assert pool.counters()["deaths"] == pool.counters()["restarts"] == 0
        assert pool.run(BATCH, stop.answers(N)).returned.all()
        # Restarted workers compile only for what can be computed.
        faults.replace(1, _raise)
        for _ in range(3):
            pool.run(BATCH, stop.answers(N))
        wait_until(lambda: pool.counters()["restarts"] == 1)
        wait_until(lambda: pool.states() == ["idle"] * N)
        assert pool.counters()["deaths"] == 0


def _raise(compute, batch):
    raise OSError("no disk")


def test_warming_up_again_waits_for_the_compilation_that_runs(compilers):
    calls = start_calls(*[functools.partial(compilers.pool.warm_up, OTHER)] * 3)
    wait_until(lambda: len(compilers.compiling) == N)
    time.sleep(0.2)
    assert not any(call.done() for call in calls)
    compilers.permit()
    for call in calls:
        call.result(20)
    compilers.pool.warm_up(OTHER)
    assert len(compilers.compiling) == N


def test_several_threads_may_warm_up_while_a_worker_fails():
    faults = Faults()
    with pools.ThreadPool(lambda x: x + 1, N, example=BATCH[0], interceptor=faults) as pool:
        faults.replace(2, _raise)
        shapes = [jax.ShapeDtypeStruct((size, 3), np.float32) for size in range(3, 9)]
        runs = [functools.partial(pool.run, BATCH, stop.answers(N))] * 6
        for call in start_calls(*[functools.partial(pool.warm_up, shape) for shape in shapes], *runs):
            call.result(60)
        faults.behaviours.clear()
        wait_until(lambda: pool.states() == ["idle"] * N)
        for shape in shapes:
            assert pool.run(np.ones((N, *shape.shape), np.float32), stop.answers(N)).returned.all()


def test_closing_ends_calls_that_wait_for_a_warm_up(compilers):
    calls = start_calls(*[functools.partial(compilers.pool.warm_up, OTHER)] * 2)
    wait_until(lambda: len(compilers.compiling) == N)
    compilers.pool.close()
    for call in calls:
        with pytest.raises(pools.PoolClosed):
            call.result(20)
    with pytest.raises(pools.PoolClosed):
        compilers.pool.warm_up(OTHER)


class NeverReady(pools.AbstractWorker):
    def start(self):
        pass

    def warm_up(self, examples):
        return Future()

    def call(self, batch):
        return Future()

    def close(self):
        pass

    def join(self, seconds):
        pass


def test_closing_ends_the_call_that_starts_the_workers():
    scheduler = Scheduler([NeverReady()], [], stuck_after=None, start_limit=300.0)
    (call,) = start_calls(functools.partial(scheduler.start, lambda: None))
    wait_until(lambda: scheduler.states() == ["starting"])
    scheduler.close()
    with pytest.raises(pools.PoolClosed):
        call.result(20)


def test_a_pool_whose_workers_are_never_ready_raises_at_the_limit_and_leaves_no_thread():
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match=r"no worker could be started within 0.2 s"):
        pools.WorkerPool(lambda _, x: x, (), [NeverReady()], start_limit=0.2)
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_a_worker_whose_process_is_broken_is_restarted():
    """As after a fault of its device, the first process of the worker raises for all batches, and the next does not."""
    faults, broken_models, before = Faults(), [], set(threading.enumerate())

    def fail_in_first_process(compute, batch):
        if not broken_models:
            broken_models.append(compute)
        if compute is broken_models[0]:
            raise OSError("device lost")
        return compute(batch)

    with pools.ThreadPool(jnp.sin, N, example=BATCH[0], interceptor=faults) as pool:
        faults.replace(3, fail_in_first_process)
        for _ in range(3):
            assert pool.run(BATCH, stop.answers(N)).returned.all()
        wait_until(lambda: pool.counters()["restarts"] == 1 and pool.states()[3] == "idle")
        responses = pool.run(BATCH, stop.answers(N))
        assert responses.faults == ()
        assert pool.counters()["raised"] == 3
        wait_until(
            lambda: sum(thread.name == "jaxcode worker 3" for thread in set(threading.enumerate()) - before) == 1
        )


def test_compiling_during_a_request_is_logged_once_and_named_in_the_error(compilers, caplog):
    batch = np.ones((N, *OTHER.shape), np.float32)
    with caplog.at_level(logging.WARNING, "jaxcode.pools"):
        compilers.pool.run(BATCH, stop.answers(N))
        assert not caplog.records
        with pytest.raises(pools.NotEnoughAnswers, match=r"4 workers were still compiling.*warm_up"):
            compilers.pool.run(batch, stop.answers(N), time_limit=1.0)
        compilers.permit()
        wait_until(lambda: compilers.pool.states() == ["idle"] * N)
        with pytest.raises(pools.NotEnoughAnswers) as caught:
            compilers.pool.run(batch, stop.answers(N), time_limit=0.2)
        assert "compiling" not in str(caught.value)
        compilers.permit()
    assert [record.kind for record in caplog.records] == ["compiling"]
    assert "float32[7, 3]" in caplog.text


def test_the_limit_and_latencies_count_from_when_the_request_was_made():
    with pools.ThreadPool(jnp.sin, N, example=BATCH[0]) as pool:
        responses = pool.run(BATCH, stop.answers(N), start_time=time.monotonic() - 5)
        assert responses.latency.min() >= 5
        assert responses.seconds >= 5
        with pytest.raises(pools.NotEnoughAnswers, match="within 10 s"):
            pool.run(BATCH, stop.answers(N), start_time=time.monotonic() - 20, time_limit=10.0, can_decode=np.all)


class TestPrecision:
    """Workers compute at the setting of jax_enable_x64 at which their pool was made."""

    x = np.linspace(0, 1, N * 6).reshape(N, 2, 3)

    def test_a_pool_made_with_x64_on_answers_in_float64(self):
        with jax.enable_x64(True), pools.ThreadPool(jnp.sin, N, example=self.x[0]) as pool:
            pool.warm_up(self.x[0])
            values = pool.run(self.x, stop.answers(N)).values
            assert values.dtype == np.float64
            np.testing.assert_allclose(values, np.sin(self.x), rtol=1e-15)

    def test_a_model_that_returns_float64_for_float32_does_so_in_the_pool(self):
        def f(x):
            return x * jnp.linspace(0, 1, 3)  # float64 where that is on

        with jax.enable_x64(True), pools.ThreadPool(f, N) as pool:
            assert pool.run(self.x.astype(np.float32), stop.answers(N)).values.dtype == np.float64

    @pytest.mark.parametrize("x64", [False, True])
    def test_requests_at_another_setting_raise_where_dtypes_would_differ(self, x64):
        with jax.enable_x64(x64):
            pool = pools.ThreadPool(jnp.sin, N)
        with pool, jax.enable_x64(not x64):
            for call in (lambda: pool.run(self.x, stop.answers(N)), lambda: pool.warm_up(self.x[0])):
                with pytest.raises(ValueError, match=rf"jax_enable_x64 is {not x64} but was {x64}.*same setting"):
                    call()
            single = self.x.astype(np.float32)
            np.testing.assert_allclose(pool.run(single, stop.answers(N)).values, np.sin(single), rtol=1e-6)
