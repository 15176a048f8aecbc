"""Tests pools of threads: early, late and invalid answers, and several requests concurrently."""

import inspect
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcode import pools, stop

from .faults import Faults, returned_shares, wait_until

N = 5
BATCH = np.arange(N * 2 * 3, dtype=np.float32).reshape(N, 2, 3)


@pytest.fixture
def faults():
    faults = Faults()
    yield faults
    faults.release()


@pytest.fixture
def pool(faults):
    with pools.ThreadPool(jnp.sin, N, example=BATCH[0], interceptor=faults) as pool:
        yield pool


def test_every_share_gets_its_own_answer(pool):
    responses = pool.run(BATCH, stop.answers(N))
    np.testing.assert_allclose(responses.values, np.sin(BATCH), rtol=1e-6)
    assert responses.returned.all()
    assert np.isfinite(responses.latency).all()
    assert responses.latency.max() <= responses.seconds
    assert responses.faults == ()


def test_late_workers_are_not_waited_for_and_their_answers_change_nothing(pool, faults):
    faults.block(1, 3)
    responses = pool.run(BATCH, stop.answers(3))
    assert returned_shares(responses) == [0, 2, 4]
    assert (responses.values[[1, 3]] == 0).all()
    assert np.isinf(responses.latency[[1, 3]]).all()
    assert [pool.states()[n] for n in (1, 3)] == ["busy", "busy"]
    faults.release()
    wait_until(lambda: pool.states() == ["idle"] * N)
    assert (responses.values[[1, 3]] == 0).all()
    assert pool.counters()["late"] == 2
    np.testing.assert_allclose(pool.run(BATCH, stop.answers(N)).values, np.sin(BATCH), rtol=1e-6)


def test_shares_do_not_wait_for_busy_workers(pool, faults):
    faults.block(0, 3)
    pool.run(BATCH, stop.answers(3))
    responses = pool.run(2 * BATCH, stop.answers(N))
    assert pool.states().count("busy") >= 2
    np.testing.assert_allclose(responses.values, np.sin(2 * BATCH), rtol=1e-6)


def test_shares_may_be_more_or_fewer_than_workers_and_are_assigned_in_order(pool, faults):
    faults.block(1, 2, 3, 4)
    pool.run(BATCH, stop.answers(1))
    many = np.arange(12 * 2 * 3, dtype=np.float32).reshape(12, 2, 3) / 10
    order = np.random.default_rng(0).permutation(12).tolist()
    responses = pool.run(many, stop.answers(12), order=order)
    faults.release()
    np.testing.assert_allclose(responses.values, np.sin(many), rtol=1e-5)
    assert np.argsort(responses.latency).tolist() == order
    assert pool.run(BATCH[:2], stop.answers(2)).values.shape == (2, 2, 3)


def test_shares_whose_answers_are_overdue_are_assigned_to_another_worker_too(pool, faults):
    faults.block(1, 3)
    responses = pool.run(BATCH, stop.answers(N), again_after=0.1)
    np.testing.assert_allclose(responses.values, np.sin(BATCH), rtol=1e-6)
    assert 0.1 <= responses.latency[[1, 3]].min() <= responses.latency[[1, 3]].max() < 5
    assert [pool.states()[n] for n in (1, 3)] == ["busy", "busy"]
    faults.release()
    wait_until(lambda: pool.counters()["late"] == 2)
    np.testing.assert_allclose(responses.values, np.sin(BATCH), rtol=1e-6)


def test_the_overdue_share_that_is_worth_most_is_assigned_again_first(pool, faults):
    """One worker is idle when all others' shares are overdue, and it computes two of these, one after the other."""
    faults.block(0, 1, 3, 4)
    worth = np.array([1.0, 3.0, 9.0, 0.0, 2.0])

    def value(returned):
        return np.where(returned, -1, worth)

    responses = pool.run(BATCH, stop.answers(3), again_after=0.1, worth=value)
    assert np.flatnonzero(responses.returned).tolist() == [1, 2, 4]
    assert responses.latency[1] < responses.latency[4]
    assert responses.worker.tolist() == [-1, 2, 2, -1, 2]


def test_a_deadline_is_kept_and_extended_only_until_answers_are_enough(pool, faults):
    faults.block(*range(N))
    threading.Timer(0.4, faults.release).start()
    responses = pool.run(BATCH, stop.deadline(0.1))
    assert responses.seconds >= 0.1
    assert responses.returned.any()
    wait_until(lambda: pool.states() == ["idle"] * N)
    faults.block(2)
    responses = pool.run(BATCH, stop.deadline(0.5))
    assert responses.returned.sum() == 4
    assert responses.seconds >= 0.5


def test_a_request_with_too_few_answers_is_refused_at_its_time_limit_with_the_reason(pool, faults):
    faults.block(1, 2, 3)
    faults.replace(0, _raise)
    with pytest.raises(pools.NotEnoughAnswers, match=r"\d of 5 answers .* 1 s.*worker 0 raised: OSError") as caught:
        pool.run(BATCH, stop.answers(N), time_limit=1.0, can_decode=lambda returned: bool(returned.all()))
    assert returned_shares(caught.value.responses) == [0, 4]  # worker 4 computed both, as worker 0 had failed


def _raise(compute, batch):
    raise OSError("no disk")


# Behaviours of a worker, with the kind and the message of the fault.
FAULTS = {
    "raises": (_raise, "raised", "OSError: no disk"),
    "NaN": (lambda compute, batch: compute(batch) * np.nan, "invalid", "NaN or infinite"),
    "one infinity": (lambda compute, batch: np.where(np.arange(3) == 1, np.inf, compute(batch)), "invalid", "infinite"),
    "shape": (lambda compute, batch: compute(batch)[:1], "invalid", r"shape \(1, 3\)"),
    "dtype": (lambda compute, batch: compute(batch).astype(np.float64), "invalid", "float64"),
    "structure": (lambda compute, batch: {"a": compute(batch)}, "invalid", "PyTreeDef"),
    "not an array": (lambda compute, batch: "no", "invalid", "a str; expected a NumPy array"),
    "a Python number": (lambda compute, batch: 1.0, "invalid", "a float; expected a NumPy array, float32 of shape"),
}


@pytest.mark.parametrize(("behaviour", "kind", "message"), FAULTS.values(), ids=FAULTS)
def test_invalid_answers_do_not_count_and_are_reported(pool, faults, behaviour, kind, message):
    faults.replace(3, behaviour)
    responses = pool.run(BATCH, stop.answers(N))
    np.testing.assert_allclose(responses.values, np.sin(BATCH), rtol=1e-6)  # another worker computed it
    (fault,) = responses.faults
    assert (fault.worker, fault.kind) == (3, kind)
    assert re.search(message, fault.message)
    assert pool.counters()[kind] == 1


def test_workers_that_keep_failing_are_quarantined_and_return_when_they_can_compute(pool, faults):
    faults.replace(3, _raise)
    for _ in range(3):
        pool.run(BATCH, stop.answers(N))
    wait_until(lambda: pool.states()[3] == "quarantined")
    assert not pool.run(BATCH, stop.answers(N)).faults
    wait_until(lambda: pool.states()[3] == "idle")
    pool.run(BATCH, stop.answers(N))
    wait_until(lambda: pool.counters()["quarantines"] == 2)
    faults.behaviours.clear()
    wait_until(lambda: pool.states()[3] == "idle")
    assert pool.run(BATCH, stop.answers(N)).returned.all()
    faults.replace(3, _raise)
    pool.run(BATCH, stop.answers(N))
    assert pool.states()[3] == "idle"


def test_requests_of_several_threads_do_not_mix(pool):
    mixed = []

    def client(scale):
        for _ in range(20):
            values = pool.run(scale * BATCH, stop.answers(N)).values
            if not np.allclose(values, np.sin(scale * BATCH), atol=1e-6):
                mixed.append(scale)

    clients = [threading.Thread(target=client, args=[np.float32(0.1 * c)], daemon=True) for c in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(30)
        assert not thread.is_alive()
    assert not mixed
    assert pool.counters()["answers"] == 6 * 20 * N


def test_closing_ends_requests_in_flight_and_leaves_no_thread(faults):
    before = set(threading.enumerate())
    pool = pools.ThreadPool(jnp.sin, N, interceptor=faults)
    faults.block(*range(N))
    threading.Timer(0.2, pool.close).start()
    with pytest.raises(pools.PoolClosed):
        pool.run(BATCH, stop.answers(N))
    with pytest.raises(pools.PoolClosed):
        pool.run(BATCH, stop.answers(N))
    pool.close()
    faults.release()
    wait_until(
        lambda: not set(threading.enumerate()) - before - {t for t in threading.enumerate() if "Timer" in t.name}
    )


def test_workers_are_spread_over_devices():
    devices = jax.devices()[:3]
    with pools.ThreadPool(lambda x: x * 2, devices=devices) as three:
        assert three.num_workers == 3
        np.testing.assert_array_equal(three.run(BATCH[:3], stop.answers(3)).values, 2 * BATCH[:3])
    with pools.ThreadPool(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), 5, devices=devices) as five:
        assert five.run(BATCH, stop.answers(5)).values.shape == (N, 2, 2)


def test_pytrees_narrow_dtypes_and_batches_of_any_size_are_computed():
    def f(batch):
        return {"sum": batch["a"].sum(-1), "wide": batch["b"]}

    with pools.ThreadPool(f, 3) as pool:
        for size in (1, 4):
            shares = {"a": np.ones((3, size, 2), np.float32), "b": jnp.ones((3, size, 2, 2), jnp.bfloat16)}
            responses = pool.run(shares, stop.answers(3))
            assert responses.values["sum"].shape == (3, size)
            assert responses.values["wide"].dtype == jnp.bfloat16


def test_warming_up_compiles_on_every_worker_before_a_request():
    traces = []

    def f(x):
        traces.append(threading.get_ident())
        return x / jnp.linalg.norm(x)  # not a number where everything is zero

    with pools.ThreadPool(f, 3, example=BATCH[0]) as pool:
        pool.warm_up(jax.ShapeDtypeStruct((7, 3), np.float32))
        before = len(traces)
        pool.run(BATCH[:3], stop.answers(3))
        pool.run(np.ones((3, 7, 3), np.float32), stop.answers(3))
        assert len(traces) == before


def test_the_pool_has_the_signature_of_the_interface():
    for name in ("run", "warm_up"):
        interface, method = (getattr(cls, name) for cls in (pools.AbstractPool, pools.WorkerPool))
        assert inspect.signature(method) == inspect.signature(interface)


def test_what_a_model_raises_when_it_is_traced_is_raised():
    with pools.ThreadPool(lambda x: x["missing"], 1) as pool:
        for call in (lambda: pool.run({"a": BATCH}, stop.answers(1)), lambda: pool.warm_up({"a": BATCH[0]})):
            with pytest.raises(KeyError, match="missing"):
                call()


def test_arguments_that_make_no_sense_raise(pool, unchecked):
    for call, message in (
        (lambda: pool.run(BATCH, stop.answers(2), order=[0, 1, 2]), "expected the numbers of the 5 shares"),
        (lambda: pool.run({"a": BATCH, "b": BATCH[:3]}, stop.answers(2)), "of the same length"),
        (lambda: pool.run(np.ones(N), stop.answers(2)), "expected"),
        (lambda: pool.run(BATCH, stop.answers(6)), "expected at most"),
        (lambda: pool.run(BATCH, stop.error_below(0.1)), "predicts no error"),
        (lambda: pools.ThreadPool(jnp.sin, 0), "num_workers is 0"),
        (lambda: pools.ThreadPool(jnp.sin, devices=[]), "devices is empty"),
        (lambda: pools.ThreadPool("sin", 2), "expected a callable"),
        (lambda: pools.ThreadPool(lambda x: x.sum(), 2, example=BATCH[0]), "expected the batch as its leading axis"),
        (lambda: pools.ThreadPool(lambda x: 1j * x, 2, example=BATCH[0]), "expected real numbers"),
        (lambda: pools.ThreadPool(lambda x: {}, 2, example=BATCH[0]), "expected at least one array"),
        (lambda: pools.ThreadPool(lambda x: 1.0, 2, example=BATCH[0]), "expected the batch as its leading axis"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
