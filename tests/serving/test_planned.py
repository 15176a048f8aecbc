"""Servers that plan groups: with a prior, with copies where its guesses are worst, and with kernel codes."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcode as jc
from jaxcode import pools, stop
from jaxcode.stragglers import Uniform
from jaxcode.surrogates.calibration import Calibration

from ..pools.faults import Faults, wait_until
from ..surrogates.cases import curve, line_surrogate

K, N = 5, 8
PRIOR = line_surrogate()
X = np.random.default_rng(0).normal(size=(3 * K - 1, 2)).astype(np.float32)
COPIES = jc.ReplicationCode(K, N)
CODES = {
    "replication": (COPIES, {"prior": PRIOR}),
    "copies by risk": (COPIES, {"prior": PRIOR, "stragglers": Uniform(3)}),
    "spline": (jc.SplineCode.systematic(K, N), {"prior": PRIOR}),
    "kernel": (jc.KernelCode(K, N), {}),
    "kernel with a prior": (jc.KernelCode(K, N), {"prior": PRIOR}),
}


@pytest.fixture(scope="module")
def shared():
    faults = Faults()
    with pools.ThreadPool(curve, N, interceptor=faults) as pool:
        yield pool, faults


@pytest.fixture
def pool(shared):
    pool, faults = shared
    wait_until(lambda: pool.states() == ["idle"] * N)
    yield pool
    faults.release()


@pytest.fixture
def faults(shared):
    return shared[1]


@pytest.mark.parametrize("size", [3, K, 3 * K - 1])
@pytest.mark.parametrize("name", CODES)
def test_results_are_those_of_coded_for_the_same_workers(pool, faults, name, size):
    code, options = CODES[name]
    faults.block(1, 3)
    server = jc.CodedServer(code, pool, stop.answers(6), **options)
    prediction = server(X[:size])
    assert prediction.returned.sum() == 6
    # A server keeps the batch's order, so that first copies need not wait for the guesses.
    predict = jc.coded(curve, code, order=lambda x, num_data: jnp.arange(len(x)), **options)
    np.testing.assert_allclose(prediction.values, predict(X[:size], prediction.returned), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(prediction.exact, predict.exact(X[:size], prediction.returned))
    assert prediction.values.dtype == np.float32
    np.testing.assert_allclose(prediction.values[prediction.exact], curve(X[:size])[prediction.exact], atol=1e-5)


def test_the_error_of_a_guess_is_the_priors_and_of_the_models_own_answer_zero(pool, faults):
    faults.block(0, 1, 2, 3)
    server = jc.CodedServer(COPIES, pool, stop.answers(4), prior=PRIOR)
    prediction = server(X)
    assert 0 < prediction.exact.sum() < len(X)
    np.testing.assert_array_equal(prediction.error[prediction.exact], 0)
    risk = np.asarray(PRIOR.with_risk(X)[1])
    np.testing.assert_allclose(prediction.error[~prediction.exact], np.sqrt(risk)[~prediction.exact], rtol=1e-5)
    np.testing.assert_allclose(prediction.values[~prediction.exact], PRIOR(X)[~prediction.exact], rtol=1e-5)


def test_a_server_stops_as_soon_as_every_guess_that_is_left_is_sure_enough(pool, faults):
    """The prior's expected error grows with the first number: a worker that computes a small one is not waited for."""
    x = np.stack([[0.1, 3.0, 3.1, 2.9, 3.2], np.zeros(5)], axis=1).astype(np.float32)
    errors = np.sqrt(np.asarray(PRIOR.with_risk(x)[1]))
    assert errors[0] < errors[1:].min()
    faults.block(0)
    tolerance = float(errors[0] + errors[1:].min()) / 2
    server = jc.CodedServer(
        COPIES, pool, stop.error_below(tolerance), prior=PRIOR, stragglers=Uniform(3), time_limit=20.0
    )
    prediction = server(x)
    np.testing.assert_array_equal(prediction.exact, [False, True, True, True, True])
    assert prediction.latency < 20


def test_a_kernel_code_without_redundancy_is_served(pool):
    code = jc.KernelCode(K, K, mixes=False)
    prediction = jc.CodedServer(code, pool, stop.answers(K))(X[:K])
    np.testing.assert_allclose(prediction.values, curve(X[:K]), atol=1e-5)
    assert prediction.exact.all()


def test_one_answer_is_enough_with_a_prior_and_none_is_not(pool, faults):
    faults.block(*range(1, N))
    server = jc.CodedServer(COPIES, pool, stop.answers(N), prior=PRIOR, time_limit=1.0)
    prediction = server(X[:K])
    assert prediction.exact.sum() == 1
    faults.block(0)
    with pytest.raises(pools.NotEnoughAnswers):
        server(X[:K])


def test_the_first_copies_are_computed_before_the_rest_is_planned():
    """The others' plan here waits until all first shares have been computed."""
    computed = threading.Semaphore(0)

    def count(worker, compute, batch):
        answer = compute(batch)
        computed.release()
        return answer

    with pools.ThreadPool(curve, 3, interceptor=count) as pool:
        shares = X[:4, None]

        def more():
            for _ in range(2):
                assert computed.acquire(timeout=20)
            return shares[2:]

        responses = pool.run(shares[:2], stop.answers(4), num_more=2, more=more, time_limit=30.0)
        np.testing.assert_allclose(responses.values[:, 0], curve(X[:4]), atol=1e-6)
        with pytest.raises(ValueError, match="more returned 1 shares; expected 2"):
            pool.run(shares[:2], stop.answers(4), num_more=2, more=lambda: shares[3:])
        with pytest.raises(RuntimeError, match="no plan"):
            pool.run(shares[:2], stop.answers(4), num_more=2, more=raise_no_plan)
        np.testing.assert_allclose(pool.run(shares, stop.answers(4)).values[:, 0], curve(X[:4]), atol=1e-6)


def raise_no_plan():
    raise RuntimeError("no plan")


@pytest.mark.parametrize("name", CODES)
def test_a_warmed_up_server_compiles_nothing_however_many_are_late(pool, faults, name):
    code, options = CODES[name]
    server = jc.CodedServer(code, pool, stop.answers(6), **options)
    server.warm_up(X[:K])
    programs = _count_programs()
    for blocked in ((), (0,), (4, 7)):
        faults.block(*blocked)
        server(X[:K])
        faults.release()
        wait_until(lambda: pool.states() == ["idle"] * N)
    assert _count_programs() == programs


def _count_programs():
    from jaxcode.serving import _codec

    return sum(fn._cache_size() for fn in vars(_codec).values() if hasattr(fn, "_cache_size"))


def test_of_overdue_inputs_the_lost_one_that_is_guessed_worst_is_sent_again_first():
    """Three of four workers never answer; the other one computes all else, and then what is overdue."""
    x = np.stack([[-3.6, -3.0, -3.3, -3.9, 3.9], np.zeros(5)], axis=1).astype(np.float32)
    copies = np.asarray(jc.allocation.plan(COPIES, x, prior=PRIOR, stragglers=Uniform(2)).assignment)[K:]
    lost = np.setdiff1d([0, 1, 2], copies)
    worst = lost[np.argmax(np.asarray(PRIOR.with_risk(x)[1])[lost])]
    assert len(lost) == 2
    faults = Faults()
    with pools.ThreadPool(curve, 4, interceptor=faults) as pool:
        server = jc.CodedServer(COPIES, pool, stop.answers(6), prior=PRIOR, stragglers=Uniform(2), again_after=0.3)
        server.warm_up(x)
        faults.block(0, 1, 2)
        prediction = server(x)
        faults.release()
    assert np.flatnonzero(prediction.returned[:3]).tolist() == [worst]
    assert prediction.exact[worst]


def test_what_was_tuned_is_served(pool, faults, tmp_path):
    tuned = jc.tune(
        curve,
        X[: 2 * K],
        num_data=K,
        num_workers=N,
        stragglers=Uniform(2),
        prior=PRIOR,
        layouts={"replication": COPIES},
        orders={"as given": None},
    )
    tuned.save(tmp_path)
    faults.block(1, 6)
    for chosen in (tuned, jc.load_tuned(tmp_path)):
        prediction = chosen.server(pool, stop.answers(6), time_limit=20.0)(X[:K])
        np.testing.assert_allclose(prediction.values, chosen.coded(curve)(X[:K], prediction.returned), atol=1e-5)
    with pytest.raises(TypeError, match="order"):
        tuned.server(pool, stop.answers(6), order=None)


def test_options_that_make_no_sense_are_refused(pool, unchecked):
    with pytest.raises(ValueError, match=r"stragglers is .* without a prior"):
        jc.CodedServer(COPIES, pool, stop.answers(6), stragglers=Uniform(2))
    with pytest.raises(ValueError, match=r"prior is .*expected a surrogate"):
        jc.CodedServer(COPIES, pool, stop.answers(6), prior=jax.nn.relu)


def test_a_server_learns_from_the_answers_that_pass_through_it():
    """The model is no line, so a line learns a little: what it must have learned is the slope, which was wrong."""
    registry = pytest.importorskip("prometheus_client").CollectorRegistry()
    prior = line_surrogate(slope=0.0)
    risk = Calibration(np.arange(64, dtype=np.float32), np.ones(64, np.float32), is_logarithm=False)
    prior = dataclasses.replace(prior, class_risk=risk, value_risk=dataclasses.replace(risk, is_logarithm=True))
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, (8 * 40, 2)).astype(np.float32)
    with (
        pools.ThreadPool(curve, N) as pool,
        jc.surrogates.Learner(prior, least_new=80, capacity=200) as learner,
    ):
        server = jc.CodedServer(COPIES, pool, stop.answers(6), prior=learner, stragglers=Uniform(2))
        server.register_metrics(registry)
        server.warm_up(x[:40])
        programs = _count_programs()
        for start in range(0, len(x), 40):
            server(x[start : start + 40])
            learner.wait()
        assert _count_programs() == programs
        counters = server.counters()["prior"]
        assert 200 < counters["observed"] <= len(x)
        assert counters["rounds"] >= 2
        assert counters["improved"] >= 1
        assert counters["squared_error"] < 0.1
        assert registry.get_sample_value("jaxcode_prior_events_total", {"event": "rounds"}) == counters["rounds"]
        before, after = (np.mean((prior(x) - curve(x)) ** 2) for prior in (prior, learner.surrogate))
        assert after < 0.01 * before
        assert float(np.mean(learner.surrogate.with_risk(x)[1])) < 0.5 * before
