"""The server: what it answers, when, and what it says of it."""

import asyncio
import contextlib
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxcode import (
    BerrutCode,
    CodedServer,
    ReplicationCode,
    SplineCode,
    coded,
    ordering,
    outputs,
    pools,
    robust,
    stop,
)
from jaxcode.serving import most_telling_first

from .pools.faults import Faults, until

CODE = SplineCode.systematic(5, 12)
X = np.random.default_rng(0).normal(size=(17, 4)).astype(np.float32)


def f(x):
    return {"logits": jnp.tanh(x @ jnp.ones((4, 3)) / 2), "norm": jnp.sum(x**2, axis=-1)}


@pytest.fixture(scope="module")
def _shared():
    faults = Faults()
    with pools.ThreadPool(f, 12, around=faults) as pool:
        yield pool, faults


@pytest.fixture
def pool(_shared):
    return _shared[0]


@pytest.fixture
def faults(_shared):
    pool, faults = _shared
    until(lambda: pool.states() == ["idle"] * 12)
    yield faults
    faults.go_on()


def server(pool, policy, code=CODE, **options):
    return CodedServer(code, pool, policy, **{"predict_error": False, **options})


def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("size", [1, 5, 17])
@pytest.mark.parametrize("order", [None, ordering.greedy], ids=["as it is", "ordered"])
@pytest.mark.parametrize(
    "code", [CODE, ReplicationCode(4, 12), BerrutCode.chebyshev(3, 12)], ids=["spline", "copies", "Berrut"]
)
def test_answers_are_those_of_coded_for_the_same_workers(pool, faults, code, order, size):
    faults.waits(2, 7)
    answer = server(pool, stop.answers(10), code, order=order)(X[:size])
    assert np.sum(~answer.returned) == 2
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(answer.values))
    # Groups are made up with the last input before anything else happens.
    missing = -size % code.num_data
    x = jnp.concatenate([X[:size], jnp.repeat(X[size - 1 : size], missing, axis=0)])
    expected = coded(f, code, order=order)(x, answer.returned)
    same(answer.values, jax.tree.map(lambda leaf: leaf[:size], expected))


def test_output_spaces_and_defences_are_those_of_coded(faults):
    def classify(x):
        return jax.nn.softmax(x @ jnp.eye(4))

    faults.fails(4, lambda compute, batch: 1 - compute(batch))
    with pools.ThreadPool(classify, 12, around=faults) as pool:
        options = {"output": outputs.logits, "defence": robust.leave_one_out, "order": ordering.greedy}
        answer = server(pool, stop.answers(12), **options)(np.tile(X, (5, 1)))
    liar = np.asarray(answer.suspicion.suspected)
    assert liar.sum() == 1
    assert not answer.returned[liar].any()
    predict = coded(classify, CODE, order=ordering.greedy, output=outputs.logits)
    same(answer.values, predict(jnp.asarray(np.tile(X, (5, 1))), answer.returned))


def test_predicted_errors_are_those_of_the_code_in_the_callers_order(pool, faults):
    faults.waits(1, 5, 6)
    answer = CodedServer(CODE, pool, stop.answers(9), order=ordering.greedy)(X)
    filled = np.concatenate([X, X[[-1] * 3]])
    turn = np.asarray(ordering.greedy(jnp.asarray(filled), 5))
    rows = filled[turn].reshape(4, 5, 4)
    answers = [f(CODE.encode(jnp.asarray(group))) for group in rows]
    together = jax.tree.map(lambda *leaves: jnp.stack([leaf.reshape(12, -1) for leaf in leaves], axis=1), *answers)
    _, errors = CODE.decode_with_error(together, answer.returned)
    squares = np.concatenate([np.asarray(leaf) ** 2 for leaf in jax.tree.leaves(errors)], axis=-1)
    expected = np.empty(20)
    expected[turn] = np.sqrt(squares.mean(-1)).T.reshape(-1)
    np.testing.assert_allclose(answer.error, expected[:17], rtol=1e-3, atol=1e-5)


def test_it_waits_until_the_predicted_error_is_small_enough(pool, faults):
    code = SplineCode.chebyshev(5, 12)
    faults.waits(2, 5, 8)
    answer = CodedServer(code, pool, stop.answers(4) & stop.error_below(2.0))(X)
    assert 4 <= answer.returned.sum() <= 9
    assert answer.error.max() <= 2
    faults.go_on()
    until(lambda: pool.states() == ["idle"] * 12)
    # Nothing but everyone's answer is good enough for this one.
    faults.waits(*range(1, 12, 2))
    future = CodedServer(code, pool, stop.error_below(1e-9)).submit(X)
    until(lambda: pool.states() == ["idle", "busy"] * 6)
    time.sleep(0.1)
    assert not future.done()
    faults.go_on()
    assert future.result(60).returned.all()


def test_what_cannot_be_decoded_is_refused_in_time(pool, faults):
    faults.waits(*range(12))
    late = server(pool, stop.deadline(0.05), time_limit=0.3)
    before = late.counters()["refused"]
    began = time.monotonic()
    with pytest.raises(pools.NotEnoughAnswers, match="of 12 answers came"):
        late(X)
    assert time.monotonic() - began < 5
    assert late.counters()["refused"] == before + 1


def test_replication_waits_for_a_copy_of_each_input(pool, faults):
    faults.waits(1, 5, 9)
    future = server(pool, stop.answers(1), ReplicationCode(4, 12)).submit(X)
    until(lambda: [n for n, state in enumerate(pool.states()) if state == "busy"] == [1, 5, 9])
    time.sleep(0.1)
    assert not future.done()
    faults.go_on()
    same(future.result(60).values, f(jnp.asarray(X)))


def test_what_is_late_is_given_to_another_worker_if_one_asks_for_it(pool, faults):
    faults.waits(0, 4)
    answer = server(pool, stop.answers(12), again_after=0.1)(X)
    assert answer.returned.all()
    assert answer.latency < 5


def test_a_code_may_be_for_more_workers_than_there_are(pool, faults):
    code = SplineCode.systematic(5, 40)
    answer = server(pool, stop.answers(40), code)(X[:5])
    same(answer.values, coded(f, code)(jnp.asarray(X[:5]), answer.returned))


@pytest.mark.parametrize("layout", ["systematic", "repeated", "chebyshev"])
def test_what_tells_most_is_given_out_first(layout):
    code = getattr(SplineCode, layout)(6, 15)
    first = most_telling_first(code)
    assert sorted(first) == list(range(15))
    if layout == "chebyshev":
        assert sorted(first[:2]) == [0, 14]
    else:
        np.testing.assert_allclose(np.sort(code.worker_nodes[first[:6]]), code.data_nodes)
    # Whatever is left out at the end, what was given out is spread over the whole.
    assert np.diff(np.sort(np.arccos(code.worker_nodes[first[:8]] / code.worker_nodes[-1]))).max() < 1
    assert most_telling_first(ReplicationCode(3, 7)) == list(range(7))


def test_several_requests_at_once_in_threads_and_in_an_event_loop(pool, faults):
    many = server(pool, stop.answers(12), max_in_flight=4)
    batches = [X * np.float32(scale) for scale in np.linspace(0.1, 1, 10)]
    for batch, future in [(batch, many.submit(batch)) for batch in batches]:
        same(future.result(30).values["norm"], coded(f, CODE)(jnp.asarray(batch))["norm"])

    async def all_of_them():
        return await asyncio.gather(*(many.asynchronously(batch) for batch in batches))

    for batch, answer in zip(batches, asyncio.run(all_of_them()), strict=True):
        same(answer.values["norm"], coded(f, CODE)(jnp.asarray(batch))["norm"])
    many.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        many.submit(X)


def test_counters_and_logs_say_what_happened(pool, faults, caplog):
    faults.waits(3)
    counted = server(pool, stop.answers(11))
    with caplog.at_level(logging.INFO, "jaxcode"):
        for _ in range(3):
            counted(X)
    counters = counted.counters()
    assert (counters["answered"], counters["refused"]) == (3, 0)
    assert 1 <= counters["stragglers"] <= 3  # those who are free do the part of one who is late
    assert counters["latency"][np.inf] == 3
    assert sorted(counters["latency"].values()) == list(counters["latency"].values())
    assert counters["workers"]["answers"] >= 33
    records = [record for record in caplog.records if record.name == "jaxcode.serving"]
    assert [(record.kind, record.batch) for record in records] == [("answered", 17)] * 3
    assert sum(12 - record.answers for record in records) == counters["stragglers"]


def test_metrics_are_what_prometheus_reads(pool, faults):
    registry = prometheus_client.CollectorRegistry()
    counted = server(pool, stop.answers(12))
    counted.register_metrics(registry)
    counted(X)
    text = prometheus_client.generate_latest(registry).decode()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["jaxcode_requests_total", "answered"] == 1
    assert samples["jaxcode_requests_total", "refused"] == 0
    assert samples["jaxcode_latency_seconds_bucket", "+Inf"] == 1
    assert samples["jaxcode_latency_seconds_count",] == 1
    assert samples["jaxcode_worker_events_total", "answers"] >= 12
    assert sum(samples["jaxcode_workers", state] for state in ("idle", "busy", "starting", "quarantined")) == 12


def test_warming_up_leaves_nothing_to_compile(pool, faults):
    warm = CodedServer(CODE, pool, stop.answers(10), order=ordering.greedy)
    warm.warm_up(X)
    with jax.log_compiles(), _compiled() as names:
        faults.waits(2)
        warm(X)
        faults.does.clear()
        warm(X[:16])
    assert names == []


@contextlib.contextmanager
def _compiled():
    names = []
    handler = logging.Handler()
    handler.emit = lambda record: names.append(record.getMessage()) if "Compiling" in record.getMessage() else None
    logging.getLogger("jax").addHandler(handler)
    try:
        yield names
    finally:
        logging.getLogger("jax").removeHandler(handler)


def test_what_makes_no_sense_is_refused(pool, unchecked):
    for wrong, message in (
        (lambda: server(pool, stop.answers(13)), "expected at most as many"),
        (lambda: server(pool, stop.error_below(0.1)), "predicts no error"),
        (lambda: server(pool, stop.answers(3), ReplicationCode(4, 12), predict_error=True), "ReplicationCode"),
        (lambda: server(pool, stop.answers(3), time_limit=0), "time_limit is 0"),
        (lambda: server(pool, stop.answers(3), again_after=-1.0), r"again_after is -1\.0"),
        (lambda: server(pool, stop.answers(3))(np.ones(())), "expected one leading axis"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
