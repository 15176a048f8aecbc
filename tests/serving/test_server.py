"""The server: its predictions, how long it waits, what it compiles, and what it refuses."""

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
from flax import nnx
from prometheus_client.parser import text_string_to_metric_families

import jaxcode as jc
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
from jaxcode.serving import QueueFull
from jaxcode.serving._dispatch import dispatch_order

from ..pools.faults import Faults, wait_until

CODE = SplineCode.systematic(5, 12)
X = np.random.default_rng(0).normal(size=(17, 4)).astype(np.float32)


def f(x):
    return {"logits": jnp.tanh(x @ jnp.ones((4, 3)) / 2), "norm": jnp.sum(x**2, axis=-1)}


@pytest.fixture(scope="module")
def _shared():
    faults = Faults()
    with pools.ThreadPool(f, 12, interceptor=faults) as pool:
        yield pool, faults


@pytest.fixture
def pool(_shared):
    return _shared[0]


@pytest.fixture
def faults(_shared):
    pool, faults = _shared
    wait_until(lambda: pool.states() == ["idle"] * 12)
    yield faults
    faults.release()


def make_server(pool, policy, code=CODE, **options):
    return CodedServer(code, pool, policy, **{"predict_error": False, **options})


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def pad_groups(x, num_data):
    """The batch with its last input repeated up to whole groups."""
    return np.concatenate([x, np.repeat(x[-1:], -len(x) % num_data, axis=0)])


# ---- predictions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 13, 17])
@pytest.mark.parametrize(
    "code", [CODE, ReplicationCode(4, 12), BerrutCode.chebyshev(3, 12)], ids=["spline", "copies", "Berrut"]
)
def test_results_are_those_of_coded_for_the_same_workers(pool, faults, code, size):
    faults.block(2, 7)
    prediction = make_server(pool, stop.answers(10), code)(X[:size])
    assert np.sum(~prediction.returned) == 2
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(prediction.values))
    assert_close(prediction.values, coded(f, code)(jnp.asarray(X[:size]), prediction.returned))


@pytest.mark.parametrize("size", [1, 13, 20])
def test_an_order_is_applied_to_the_inputs_without_their_padding(pool, faults, size):
    x = np.concatenate([X, X[:3] + 1])[:size]

    def by_first_number(x, num_data):
        return jnp.argsort(-x[:, 0])

    faults.block(2, 7)
    prediction = make_server(pool, stop.answers(10), order=by_first_number)(x)
    assert_close(prediction.values, coded(f, CODE, order=by_first_number)(jnp.asarray(x), prediction.returned))


def test_greedy_ordering_of_whole_groups_is_that_of_coded(pool, faults):
    faults.block(2, 7)
    x = pad_groups(X, 5)
    prediction = make_server(pool, stop.answers(10), order=ordering.greedy)(x)
    assert_close(prediction.values, coded(f, CODE, order=ordering.greedy)(jnp.asarray(x), prediction.returned))


def test_output_spaces_and_defences_are_those_of_coded(faults):
    def classify(x):
        return jax.nn.softmax(x @ jnp.eye(4))

    faults.replace(4, lambda compute, batch: 1 - compute(batch))
    x = np.tile(X, (5, 1))[:80]
    options = {"output": outputs.logits, "defence": robust.leave_one_out, "order": ordering.greedy}
    with pools.ThreadPool(classify, 12, interceptor=faults) as pool:
        prediction = make_server(pool, stop.answers(12), **options)(x)
    flagged = np.asarray(prediction.detection.flagged)
    assert flagged.sum() == 1
    assert not prediction.returned[flagged].any()
    predict = coded(classify, CODE, order=ordering.greedy, output=outputs.logits)
    assert_close(prediction.values, predict(jnp.asarray(x), prediction.returned))


@pytest.mark.parametrize(("num_groups", "examined"), [(1, 1), (3, 2), (4, 4), (5, 4)])
def test_groups_that_repeat_others_are_no_evidence_for_the_defence(pool, faults, num_groups, examined):
    seen = []

    def record(code, answers, returned):
        seen.append({leaf.shape[1] for leaf in jax.tree.leaves(answers)})
        return robust.only_finite(code, answers, returned)

    make_server(pool, stop.answers(12), defence=record)(np.ones((5 * num_groups, 4), np.float32))
    assert seen == [{examined}]


def test_predicted_errors_are_those_of_the_code_in_the_order_of_the_batch(pool, faults):
    faults.block(1, 5, 6)
    x = pad_groups(X, 5)
    prediction = CodedServer(CODE, pool, stop.answers(9), order=ordering.greedy)(x)
    permutation = np.asarray(ordering.greedy(jnp.asarray(x), 5))
    groups = x[permutation].reshape(4, 5, 4)
    answers = [f(CODE.encode(jnp.asarray(group))) for group in groups]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([leaf.reshape(12, -1) for leaf in leaves], axis=1), *answers)
    _, errors = CODE.decode_with_error(stacked, prediction.returned)
    squares = np.concatenate([np.asarray(leaf) ** 2 for leaf in jax.tree.leaves(errors)], axis=-1)
    expected = np.empty(20)
    expected[permutation] = np.sqrt(squares.mean(-1)).T.reshape(-1)
    np.testing.assert_allclose(prediction.error, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "code", [CODE, ReplicationCode(5, 12), SplineCode.chebyshev(5, 12)], ids=["systematic", "copies", "Chebyshev"]
)
@pytest.mark.parametrize("order", [None, ordering.greedy], ids=["as it is", "ordered"])
def test_exact_results_are_those_of_inputs_that_were_computed(pool, faults, code, order):
    faults.block(0, 1, 2)
    prediction = make_server(pool, stop.answers(9), code, order=order, predict_error=None)(X)
    by_member = np.asarray(code.exact(prediction.returned))
    if order is None:
        np.testing.assert_array_equal(prediction.exact, by_member[np.arange(17) % 5])
    assert prediction.exact.sum() >= by_member.sum() * 2
    truth = f(jnp.asarray(X[prediction.exact]))
    assert_close(jax.tree.map(lambda leaf: leaf[prediction.exact], prediction.values), truth)
    if code.predicts_error:
        assert (prediction.error[prediction.exact] == 0).all()


def test_the_arrays_of_a_prediction_are_read_only(pool, faults):
    x = X.copy()
    x[3] = np.nan
    for batch in (X, x, X[:5]):
        prediction = CodedServer(CODE, pool, stop.answers(12))(batch)
        arrays = [*jax.tree.leaves(prediction.values), prediction.error, prediction.exact, prediction.returned]
        for array in arrays:
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0


def test_it_waits_until_the_predicted_error_is_small_enough(pool, faults):
    code = SplineCode.chebyshev(5, 12)
    faults.block(2, 5, 8)
    prediction = CodedServer(code, pool, stop.answers(4) & stop.error_below(2.0))(X)
    assert 4 <= prediction.returned.sum() <= 9
    assert prediction.error.max() <= 2
    faults.release()
    wait_until(lambda: pool.states() == ["idle"] * 12)
    # Only all answers are good enough for this one.
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


def test_an_overdue_coded_input_is_given_to_another_worker_if_asked_for(pool, faults):
    faults.block(0, 4)
    prediction = make_server(pool, stop.answers(12), again_after=0.1, time_limit=50.0)(X)
    assert prediction.returned.all()


def test_a_code_may_be_for_more_workers_than_there_are(pool, faults):
    code = SplineCode.systematic(5, 40)
    prediction = make_server(pool, stop.answers(40), code)(X[:5])
    assert_close(prediction.values, coded(f, code)(jnp.asarray(X[:5]), prediction.returned))


@pytest.mark.parametrize("layout", ["systematic", "repeated", "chebyshev"])
def test_coded_inputs_whose_answers_say_most_are_computed_first(layout):
    code = getattr(SplineCode, layout)(6, 15)
    order = dispatch_order(code)
    assert sorted(order) == list(range(15))
    if layout == "chebyshev":
        assert sorted(order[:2]) == [0, 14]
    else:
        np.testing.assert_allclose(np.sort(code.nodes.workers[order[:6]]), code.nodes.data)
    # Whichever come last, the first ones are spread over all nodes.
    assert np.diff(np.sort(np.arccos(code.nodes.workers[order[:8]] / code.nodes.workers[-1]))).max() < 1
    assert dispatch_order(ReplicationCode(3, 7)) == list(range(7))


# ---- inputs that are not finite, integers, precision ---------------------------------------------------------


@pytest.mark.parametrize(
    "code", [CODE, BerrutCode.chebyshev(5, 12), ReplicationCode(5, 12)], ids=["spline", "Berrut", "copies"]
)
@pytest.mark.parametrize("order", [None, ordering.greedy], ids=["as it is", "ordered"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_spoil_only_their_own_results(pool, faults, caplog, code, order, value):
    x = X.copy()
    spoilt = [0, 9, 16]
    x[spoilt, [0, 3, 1]] = value
    others = np.delete(np.arange(17), spoilt)
    server = make_server(pool, stop.answers(12), code, order=order, predict_error=None)
    expected = server(X[others])
    with caplog.at_level(logging.WARNING, "jaxcode"):
        prediction = server(x)
    assert any("inputs 0, 9, 16 of a batch of 17" in record.getMessage() for record in caplog.records)
    for leaf, leaf_of_others in zip(jax.tree.leaves(prediction.values), jax.tree.leaves(expected.values), strict=True):
        assert np.isnan(leaf[spoilt]).all()
        np.testing.assert_array_equal(leaf[others], leaf_of_others)
    assert not prediction.exact[spoilt].any()
    np.testing.assert_array_equal(prediction.exact[others], expected.exact)
    if code.predicts_error:
        assert np.isinf(prediction.error[spoilt]).all()
        np.testing.assert_array_equal(prediction.error[others], expected.error)


def test_a_number_too_large_for_single_precision_is_not_finite(pool, faults):
    x = X.astype(np.float64)
    x[2, 1] = 1e300
    prediction = make_server(pool, stop.answers(12))(x)
    assert np.flatnonzero(np.isnan(prediction.values["norm"])).tolist() == [2]


def test_a_batch_without_a_finite_input_is_refused_by_name(pool):
    with pytest.raises(ValueError, match="x has a NaN or an infinite number in every one of its 2 inputs"):
        make_server(pool, stop.answers(3))(np.full((2, 4), np.nan, np.float32))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_codes_that_do_not_mix_serve_integer_tokens(dtype):
    model = nnx.Embed(100, 3, rngs=nnx.Rngs(0))
    tokens = np.arange(28, dtype=dtype).reshape(7, 4)
    with pools.ThreadPool(model, 6) as pool:
        prediction = CodedServer(ReplicationCode(2, 6), pool, stop.answers(4))(tokens)
        np.testing.assert_array_equal(prediction.values, model(jnp.asarray(tokens)))


def test_a_code_that_mixes_refuses_integers(pool):
    with pytest.raises(ValueError, match=r"dtype int32.*embeddings"):
        make_server(pool, stop.answers(3))(np.ones((5, 4), np.int32))


def test_codes_that_do_not_mix_keep_integers_that_single_precision_cannot_hold():
    with pools.ThreadPool(lambda x: (x % 10).astype(jnp.float32), 3) as pool:
        prediction = CodedServer(ReplicationCode(2, 3), pool, stop.answers(2))(np.array([2**24 + 1, 7]))
    np.testing.assert_array_equal(prediction.values, [7, 7])


def test_every_thread_computes_in_the_precision_in_which_the_server_was_made():
    x = np.random.default_rng(1).normal(size=(5, 4))
    with jax.enable_x64(True), pools.ThreadPool(f, 12) as pool:
        server = CodedServer(CODE, pool, stop.answers(12), time_limit=60.0)
        server.warm_up(x)
        expected = f(jnp.asarray(x))
        inside = [server(x), server.submit(x).result(60)]
        with jax.enable_x64(False):
            outside = [server(x), server.submit(x).result(60), asyncio.run(server.predict_async(x))]
        server.close()
    for prediction in (*inside, *outside):
        for name, leaf in prediction.values.items():
            assert leaf.dtype == np.float64
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-12)


def test_a_server_of_single_precision_refuses_callers_in_double_precision(pool):
    server = make_server(pool, stop.answers(12))
    with jax.enable_x64(True):
        for call in (server, server.submit, server.warm_up):
            with pytest.raises(ValueError, match="x64 is on here, but was off where the server was made"):
                call(X.astype(np.float64))


def test_a_warm_server_transfers_nothing_implicitly(pool, faults):
    x = X.copy()
    x[3] = np.nan
    server = CodedServer(CODE, pool, stop.answers(12), order=ordering.greedy, defence=robust.only_finite)
    server(x)
    with jax.transfer_guard("disallow"):
        prediction = server(x)
    assert np.flatnonzero(np.isnan(prediction.values["norm"])).tolist() == [3]


@pytest.mark.parametrize("setting", [jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")])
def test_strict_promotion_changes_nothing(pool, faults, setting):
    server = make_server(pool, stop.answers(12), order=ordering.greedy)
    expected = server(X)
    jax.clear_caches()
    with setting:
        assert_close(server(X).values, expected.values)


# ---- what is compiled ----------------------------------------------------------------------------------------


def test_a_power_of_two_groups_is_compiled_for_here_and_in_the_workers():
    traces = collections.Counter()

    def model(x):
        traces["model"] += 1
        return 2 * x

    def order(x, num_data):
        traces["order"] += 1
        return jnp.arange(len(x))

    def of_answers(answers):
        traces["decode"] += 1
        return answers

    output = jc.outputs.OutputSpace("counted", of_answers, lambda results: results)
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
    with jax.log_compiles(), _compiled() as names:
        build()(X[:16])
    assert names == []


def test_warming_up_leaves_nothing_to_compile(pool, faults, caplog):
    server = CodedServer(CODE, pool, stop.answers(10), order=ordering.greedy, defence=robust.only_finite)
    server.warm_up(jax.ShapeDtypeStruct(X.shape, X.dtype))
    with jax.log_compiles(), _compiled() as names, caplog.at_level(logging.WARNING, "jaxcode.serving"):
        faults.block(2)
        server(X)
        faults.behaviours.clear()
        server(X[:15])
    assert names == []
    assert not [record for record in caplog.records if record.name == "jaxcode.serving"]


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


def test_the_first_request_of_a_shape_says_that_it_compiles(pool, faults, caplog):
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


def test_a_first_request_that_is_refused_says_that_it_compiled(pool, faults):
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


def test_inputs_that_overflow_are_refused_before_the_limit_and_do_not_delay_others():
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

    async def cancel_a_coroutine():
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

    asyncio.run(cancel_a_coroutine())
    replacement = server.submit(X)
    faults.release()
    for future in (futures[0], futures[1], futures[3], replacement):
        assert future.result(60).returned.all()
    assert (server.counters()["answered"], server.counters()["rejected"]) == (4, 3)


def test_several_requests_concurrently_in_threads_and_in_an_event_loop(pool, faults):
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
    assert 1 <= counters["stragglers"] <= 3  # workers that are free compute what a late one does not
    assert counters["latency"][np.inf] == 3
    assert sorted(counters["latency"].values()) == list(counters["latency"].values())
    assert counters["workers"]["answers"] >= 33
    records = [record for record in caplog.records if getattr(record, "kind", "") == "answered"]
    assert [record.batch for record in records] == [17] * 3
    assert sum(12 - record.answers for record in records) == counters["stragglers"]


def test_metrics_are_what_prometheus_reads(pool, faults):
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
        (lambda pool: CodedServer(ReplicationCode(4, 9), pool, stop.answers(3), predict_error=True), "ReplicationCode"),
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
def test_arguments_that_make_no_sense_are_refused(pool, unchecked, build, message):
    with pytest.raises(ValueError, match=message):
        build(pool)
