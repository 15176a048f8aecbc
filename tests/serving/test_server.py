"""Tests how a server waits, compiles, queues and counts requests, and which arguments raise."""

import asyncio
import collections
import contextlib
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

import jaxcode as jc
from jaxcode import (
    BerrutCode,
    CodedServer,
    ReplicationCode,
    SplineCode,
    coded,
    ordering,
    pools,
    robust,
    stop,
)
from jaxcode.serving import QueueFull

from ..pools.faults import wait_until
from .servers import CODE, X, assert_close, f, make_server

# ---- waiting for answers -------------------------------------------------------------------------------------


def test_a_server_waits_until_the_predicted_error_is_small_enough(pool, faults):
    code = SplineCode.chebyshev(5, 12)
    faults.block(2, 5, 8)
    prediction = CodedServer(code, pool, stop.answers(4) & stop.error_below(2.0))(X)
    assert 4 <= prediction.returned.sum() <= 9
    assert prediction.error.max() <= 2
    faults.release()
    wait_until(lambda: pool.states() == ["idle"] * 12)
    # This policy is met by all answers only.
    faults.block(*range(1, 12, 2))
    future = CodedServer(code, pool, stop.error_below(1e-9)).submit(X)
    wait_until(lambda: pool.states() == ["idle", "busy"] * 6)
    time.sleep(0.1)
    assert not future.done()
    faults.release()
    assert future.result(60).returned.all()


def test_replication_waits_for_a_copy_of_each_input(pool, faults):
    faults.block(1, 5, 9)
    future = make_server(pool, stop.answers(1), ReplicationCode(4, 12)).submit(X)
    wait_until(lambda: [n for n, state in enumerate(pool.states()) if state == "busy"] == [1, 5, 9])
    time.sleep(0.1)
    assert not future.done()
    faults.release()
    assert_close(future.result(60).values, f(jnp.asarray(X)))


def test_an_overdue_coded_input_is_assigned_to_another_worker_too(pool, faults):
    faults.block(0, 4)
    prediction = make_server(pool, stop.answers(12), again_after=0.1, time_limit=50.0)(X)
    assert prediction.returned.all()


# ---- what is compiled ----------------------------------------------------------------------------------------


def test_host_and_workers_compile_for_powers_of_two_groups_only():
    traces = collections.Counter()

    def model(x):
        traces["model"] += 1
        return 2 * x

    def order(x, num_data):
        traces["order"] += 1
        return jnp.arange(len(x))

    def count(answers):
        traces["decode"] += 1
        return answers

    output = jc.outputs.OutputSpace("counted", count, lambda results: results)
    with pools.ThreadPool(model, 3) as pool:
        server = make_server(pool, stop.answers(3), SplineCode.systematic(2, 3), order=order, output=output)
        for size in range(1, 17):
            x = np.arange(size, dtype=np.float32)[:, None]
            np.testing.assert_allclose(server(x).values, 2 * x, atol=1e-5)
    # One, two, four and eight groups; the model in each of three workers, and once to know the shape of its answers.
    assert traces["order"] == 4
    assert traces["decode"] == 4
    assert traces["model"] <= 4 * (3 + 1)


def test_servers_of_equal_settings_share_what_is_compiled(pool, faults):
    def build():
        return CodedServer(SplineCode.systematic(5, 12), pool, stop.answers(12), order=ordering.greedy)

    build()(X)
    with jax.log_compiles(), _log_compilations() as names:
        build()(X[:16])
    assert names == []


def test_warming_up_leaves_nothing_to_compile(pool, faults, caplog):
    server = CodedServer(CODE, pool, stop.answers(10), order=ordering.greedy, defence=robust.only_finite)
    server.warm_up(jax.ShapeDtypeStruct(X.shape, X.dtype))
    with jax.log_compiles(), _log_compilations() as names, caplog.at_level(logging.WARNING, "jaxcode.serving"):
        faults.block(2)
        server(X)
        faults.behaviours.clear()
        server(X[:15])
    assert names == []
    assert not [record for record in caplog.records if record.name == "jaxcode.serving"]


@contextlib.contextmanager
def _log_compilations():
    """Yields the list of the messages in which JAX names the programs that it compiles."""
    names = []
    handler = logging.Handler()
    handler.emit = lambda record: names.append(record.getMessage()) if "Compiling" in record.getMessage() else None
    logging.getLogger("jax").addHandler(handler)
    try:
        yield names
    finally:
        logging.getLogger("jax").removeHandler(handler)


def test_the_first_request_of_a_shape_logs_that_it_compiles(pool, faults, caplog):
    server = make_server(pool, stop.answers(12))
    for size, is_first in ((5, True), (3, False), (10, True), (6, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "jaxcode.serving"):
            server(X[:size])
        messages = [record.getMessage() for record in caplog.records if record.name == "jaxcode.serving"]
        assert messages == (
            [f"compiles for batches of float32 of shape ({5 if size <= 5 else 10}, 4): call warm_up beforehand"]
            if is_first
            else []
        )


def test_the_error_of_a_refused_first_request_says_that_it_compiled(pool, faults):
    faults.block(*range(12))
    server = make_server(pool, stop.answers(12), time_limit=0.3)
    with pytest.raises(pools.NotEnoughAnswers, match=r"first request of its shape.*call warm_up beforehand"):
        server(X)


# ---- time, the queue -----------------------------------------------------------------------------------------


def test_a_request_with_too_few_answers_is_refused_at_its_time_limit(pool, faults):
    faults.block(*range(12))
    server = make_server(pool, stop.deadline(0.05), time_limit=0.3)
    with pytest.raises(pools.NotEnoughAnswers, match="of 12 answers came"):
        server.submit(X).result(30)
    assert server.counters()["refused"] == 1


def test_requests_whose_answers_overflow_are_refused_before_the_limit_and_delay_no_other():
    with pools.ThreadPool(jnp.exp, 4) as pool:
        server = make_server(pool, stop.answers(4), SplineCode.systematic(2, 4), time_limit=300.0)
        server.warm_up(np.ones((2, 1), np.float32))
        poisoned = [server.submit(np.full((2, 1), 200, np.float32)) for _ in range(8)]
        good = server.submit(np.ones((2, 1), np.float32))
        for future in poisoned:
            with pytest.raises(pools.NotEnoughAnswers, match="NaN or infinite"):
                future.result(60)
        np.testing.assert_allclose(good.result(60).values, np.e, rtol=1e-4)
        server.close()


def test_time_in_the_queue_is_part_of_the_latency(pool, faults):
    server = make_server(pool, stop.answers(12), max_in_flight=1)
    server.warm_up(X)
    faults.block(*range(12))
    futures = [server.submit(X) for _ in range(3)]
    time.sleep(0.3)
    faults.release()
    assert all(future.result(60).latency >= 0.3 for future in futures)


def test_time_in_the_queue_is_part_of_the_limit(pool, faults):
    faults.block(*range(12))
    server = make_server(pool, stop.answers(12), max_in_flight=1, time_limit=1.0)
    futures = [server.submit(X) for _ in range(40)]
    # One after the other, each with a limit of its own, they would take 40 s.
    for future in futures:
        with pytest.raises(pools.NotEnoughAnswers):
            future.result(15)
    with pytest.raises(pools.NotEnoughAnswers, match="waited in the queue for its whole time limit of 1 s"):
        futures[-1].result()
    assert server.counters()["refused"] == 40


def test_requests_beyond_the_queue_are_rejected_and_cancelled_ones_make_room(pool, faults):
    faults.block(*range(12))
    server = make_server(pool, stop.answers(12), max_in_flight=2, max_queued=2)
    futures = [server.submit(X) for _ in range(4)]
    wait_until(lambda: futures[1].running())
    with pytest.raises(QueueFull, match="2 requests are in flight and 2 wait"):
        server.submit(X)

    async def cancel_requests():
        with pytest.raises(QueueFull):
            await server.predict_async(X)
        assert futures[2].cancel()
        task = asyncio.create_task(server.predict_async(X))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            server.submit(X)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(cancel_requests())
    replacement = server.submit(X)
    faults.release()
    for future in (futures[0], futures[1], futures[3], replacement):
        assert future.result(60).returned.all()
    assert (server.counters()["answered"], server.counters()["rejected"]) == (4, 3)


def test_concurrent_requests_get_their_own_results(pool, faults):
    server = make_server(pool, stop.answers(12), max_in_flight=4)
    batches = [X * np.float32(scale) for scale in np.linspace(0.1, 1, 10)]
    for batch, future in [(batch, server.submit(batch)) for batch in batches]:
        assert_close(future.result(30).values["norm"], coded(f, CODE)(jnp.asarray(batch))["norm"])

    async def predict_all():
        return await asyncio.gather(*(server.predict_async(batch) for batch in batches))

    for batch, prediction in zip(batches, asyncio.run(predict_all()), strict=True):
        assert_close(prediction.values["norm"], coded(f, CODE)(jnp.asarray(batch))["norm"])
    server.close()
    with pytest.raises(RuntimeError, match="the server is closed"):
        server.submit(X)


# ---- counters ------------------------------------------------------------------------------------------------


def test_counters_and_logs_report_what_happened(pool, faults, caplog):
    faults.block(3)
    server = make_server(pool, stop.answers(11))
    with caplog.at_level(logging.INFO, "jaxcode"):
        for _ in range(3):
            server(X)
    counters = server.counters()
    assert (counters["answered"], counters["refused"], counters["rejected"]) == (3, 0, 0)
    assert 1 <= counters["stragglers"] <= 3  # idle workers compute what a late one does not
    assert counters["latency"][np.inf] == 3
    assert sorted(counters["latency"].values()) == list(counters["latency"].values())
    assert counters["workers"]["answers"] >= 33
    records = [record for record in caplog.records if getattr(record, "kind", "") == "answered"]
    assert [record.batch for record in records] == [17] * 3
    assert sum(12 - record.answers for record in records) == counters["stragglers"]


def test_prometheus_parses_the_metrics(pool, faults):
    registry = prometheus_client.CollectorRegistry()
    server = make_server(pool, stop.answers(12))
    server.register_metrics(registry)
    server(X)
    text = prometheus_client.generate_latest(registry).decode()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["jaxcode_requests_total", "answered"] == 1
    assert samples["jaxcode_requests_total", "refused"] == 0
    assert samples["jaxcode_requests_total", "rejected"] == 0
    assert samples["jaxcode_latency_seconds_bucket", "+Inf"] == 1
    assert samples["jaxcode_latency_seconds_count",] == 1
    assert samples["jaxcode_worker_events_total", "answers"] >= 12
    assert sum(samples["jaxcode_workers", state] for state in ("idle", "busy", "starting", "quarantined")) == 12


# ---- arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda pool: make_server(pool, stop.answers(13)), "expected at most as many"),
        (lambda pool: make_server(pool, stop.error_below(0.1)), "predicts no error"),
        (
            lambda pool: CodedServer(BerrutCode.chebyshev(4, 9), pool, stop.answers(3), predict_error=True),
            "InterpolatingCode predicts no errors",
        ),
        (lambda pool: make_server(pool, stop.answers(3), time_limit=0), "time_limit is 0"),
        (lambda pool: make_server(pool, stop.answers(3), again_after=-1.0), r"again_after is -1\.0"),
        (lambda pool: make_server(pool, stop.answers(3), max_in_flight=0), "max_in_flight is 0"),
        (lambda pool: make_server(pool, stop.answers(3), max_queued=-1), "max_queued is -1"),
        (lambda pool: make_server(pool, stop.answers(3), "spline"), "code is 'spline'"),
        (lambda pool: make_server(pool, stop.answers(3))(np.ones(())), "expected one leading axis"),
        (lambda pool: make_server(pool, stop.answers(3), order=lambda x, k: jnp.zeros(len(x), int))(X), "permutation"),
        (
            lambda pool: jax.jit(
                lambda alpha: make_server(pool, stop.answers(3), SplineCode(alpha, CODE.nodes.workers))
            )(jnp.asarray(CODE.nodes.data)),
            "nodes or smoothing the host does not know",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_arguments_that_make_no_sense_raise(pool, unchecked, build, message):
    with pytest.raises(ValueError, match=message):
        build(pool)
