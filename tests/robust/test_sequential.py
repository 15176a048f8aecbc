"""The sequential test: who is flagged after how many requests, who is not, and what cannot be told."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcode as jc
from jaxcode import stop
from jaxcode.codes import Plan, Prior
from jaxcode.pools import ThreadPool
from jaxcode.robust import SequentialTest, calibrate

from ..surrogates.cases import curve, line_surrogate
from . import attacks

K, N, OUTPUTS = 10, 20, 4
COPIES = jc.ReplicationCode(K, N)
ALL = np.ones(N, bool)
TEST = SequentialTest()


def draw_request(rng, noise=0.3):
    """Correct answers (N, 1, outputs) to K random inputs, whose prior is off by noise, and the plan of one group."""
    truth = rng.normal(size=(K, OUTPUTS))
    # Guesses of some inputs are worse than those of others, which the prior expects.
    errors = noise * np.exp(rng.normal(size=K))
    guesses = truth + errors[:, None] * rng.normal(size=(K, OUTPUTS))
    assignment = np.concatenate([np.arange(K), rng.integers(0, K, N - K)])
    prior = Prior(guesses[assignment], guesses, errors, errors[assignment])
    plan = Plan(assignment.astype(np.int32), prior)
    return truth[assignment][:, None], jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], plan)


@functools.cache
def compiled(test):
    return jax.jit(
        lambda answers, returned, plans, evidence: test(COPIES, answers, returned, plans=plans, evidence=evidence)
    )


def run(attack, faulty, seed, num_requests, test=TEST, num_late=3):
    """All detections of some requests."""
    rng, evidence, detections = np.random.default_rng(seed), np.zeros(N, np.float32), []
    for _ in range(num_requests):
        answers, plans = draw_request(rng)
        sent = attacks.INDEPENDENT[attack](answers, faulty, 2.0, rng) if len(faulty) else answers
        returned = ~np.isin(np.arange(N), rng.choice(N, num_late, replace=False))
        sent[~returned] = np.nan
        detection = compiled(test)(jnp.asarray(sent, jnp.float32), returned, plans, evidence)
        assert not np.any(detection.flagged & ~returned)
        evidence = detection.evidence
        detections.append(jax.device_get(detection))
    return detections


def flagged(detections):
    return set(np.flatnonzero(np.any([detection.flagged for detection in detections], axis=0)).tolist())


@pytest.mark.parametrize("attack", ["sign-flip", "copy", "noise"])
def test_faulty_workers_are_found_request_by_request_and_no_others(attack):
    for seed in range(4):
        assert flagged(run(attack, np.array([3, 15]), seed, 40)) == {3, 15}


def test_correct_workers_are_not_flagged():
    """Nor are they suspected often: one worker of twenty is, for some time, in 300 requests."""
    detections = run("sign-flip", np.array([], int), 0, 300)
    assert flagged(detections) == set()
    assert np.mean([detection.trusted.sum() / 17 for detection in detections]) > 0.99


def test_the_mean_of_an_e_value_is_at_most_one():
    """One request adds log e to evidence that is far from its bounds; copies that agree make e-values smaller."""
    rng, before = np.random.default_rng(0), np.full(N, 5.0, np.float32)
    e_values = []
    for _ in range(200):
        answers, plans = draw_request(rng)
        detection = compiled(TEST)(jnp.asarray(answers, jnp.float32), ALL, plans, before)
        e_values.append(np.exp(np.asarray(detection.evidence) - (1 - 1 / TEST.memory) * before))
    assert 0.3 < np.mean(e_values) < 1.02


def test_a_worker_that_is_repaired_is_trusted_again():
    rng, evidence, states = np.random.default_rng(3), None, []
    for request in range(100):
        answers, plans = draw_request(rng)
        if request < 40:
            answers[7] += 5
        detection = TEST(COPIES, jnp.asarray(answers, jnp.float32), ALL, plans=plans, evidence=evidence)
        evidence = detection.evidence
        states.append(bool(detection.flagged[7]))
    assert states[39]
    assert not any(states[80:])


def test_several_groups_are_as_much_evidence_as_several_requests():
    rng = np.random.default_rng(5)
    requests = [draw_request(rng) for _ in range(16)]
    answers = np.concatenate([answers for answers, _ in requests], axis=1)
    answers[11] *= -1
    plans = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[plans for _, plans in requests])
    detection = TEST(COPIES, jnp.asarray(answers, jnp.float32), ALL, plans=plans)
    np.testing.assert_array_equal(np.flatnonzero(detection.flagged), [11])


def test_evidence_follows_the_worker_and_not_what_it_computes():
    """Worker 5 of 25 is faulty, and computes another input in every request, some workers two and some none."""
    rng, evidence = np.random.default_rng(7), np.zeros(25, np.float32)
    for _ in range(40):
        answers, plans = draw_request(rng)
        worker = rng.choice(25, N)
        answers[worker == 5] *= -1
        detection = TEST(COPIES, jnp.asarray(answers, jnp.float32), ALL, plans=plans, evidence=evidence, worker=worker)
        evidence = detection.evidence
        assert not np.any(np.asarray(detection.flagged) & (worker != 5))
    assert evidence.argmax() == 5
    assert np.sort(evidence)[-2] < evidence[5] / 2


def test_without_a_prior_three_workers_tell_who_is_wrong_and_two_do_not():
    rng, evidence = np.random.default_rng(8), None
    three, two = jc.ReplicationCode(6, 18), jc.ReplicationCode(9, 18)
    for _ in range(12):
        answers = three.encode(jnp.asarray(rng.normal(size=(6, 1, 2)), jnp.float32)).at[4].multiply(-1)
        detection = TEST(three, answers, np.ones(18, bool), evidence=evidence)
        evidence = detection.evidence
    np.testing.assert_array_equal(np.flatnonzero(detection.flagged), [4])
    evidence = None
    for _ in range(12):
        answers = two.encode(jnp.asarray(rng.normal(size=(9, 1, 2)), jnp.float32)).at[4].multiply(-1)
        detection = TEST(two, answers, np.ones(18, bool), evidence=evidence)
        evidence = detection.evidence
        np.testing.assert_array_equal(np.flatnonzero(detection.unresolved), [4, 13])
        assert detection.trusted.all()


def test_of_two_different_answers_that_nearer_to_the_guess_is_decoded():
    rng = np.random.default_rng(9)
    answers, plans = draw_request(rng, noise=0.05)
    plan = jax.tree.map(lambda leaf: leaf[0], plans)
    first = int(np.flatnonzero(np.bincount(plan.assignment[K:], minlength=K) == 1)[0])
    sent = answers.copy()
    sent[first] *= -1
    detection = TEST(COPIES, jnp.asarray(sent, jnp.float32), ALL, plans=plans)
    second = K + int(np.flatnonzero(np.asarray(plan.assignment[K:]) == first)[0])
    np.testing.assert_array_equal(np.flatnonzero(detection.unresolved), [first, second])
    assert not detection.flagged.any()
    results = COPIES.decode(jnp.asarray(sent[:, 0], jnp.float32), detection.trusted, plan)
    np.testing.assert_allclose(results, answers[:K, 0], rtol=1e-5)


def test_answers_that_are_not_finite_are_flagged_at_once_and_count_as_evidence():
    answers, plans = draw_request(np.random.default_rng(1))
    answers[6] = np.inf
    detection = TEST(COPIES, jnp.asarray(answers, jnp.float32), ALL, plans=plans)
    np.testing.assert_array_equal(np.flatnonzero(detection.flagged), [6])
    assert np.isinf(detection.score[6])
    assert detection.evidence.argmax() == 6


# ---- codes that mix inputs ---------------------------------------------------------------------------------


def network(x):
    weights = np.random.default_rng(7)
    inner = jnp.tanh(x @ jnp.asarray(weights.normal(size=(2, 16)), jnp.float32))
    return inner @ jnp.asarray(weights.normal(size=(16, 2)), jnp.float32) + 3 * x


@pytest.fixture(scope="module")
def calibrated():
    code = jc.SplineCode.systematic(K, N)
    x = np.random.default_rng(2).normal(size=(30 * K, 2)).astype(np.float32)
    prior = line_surrogate(slope=3.0)
    return code, prior, calibrate(network, code, x, prior)


def test_calibrated_workers_at_and_between_inputs_are_equal(calibrated):
    """Without the baseline, those between inputs, whose guesses are worse, would be flagged."""
    code, prior, test = calibrated
    rng = np.random.default_rng(3)

    @jax.jit
    def answer(x, sign, evidence):
        plan = jc.allocation.plan(code, x, prior=prior)
        answers = sign[:, None, None] * network(code.encode(x, plan))[:, None]
        return test(code, answers, ALL, plans=jax.tree.map(lambda leaf: leaf[None], plan), evidence=evidence)

    for faulty in ([], [8]):
        sign, evidence = np.where(np.isin(np.arange(N), faulty), -1, 1).astype(np.float32), jnp.zeros(N)
        for _ in range(40):
            detection = answer(rng.normal(size=(K, 2)).astype(np.float32), sign, evidence)
            evidence = detection.evidence
        assert np.flatnonzero(detection.flagged).tolist() == faulty


def test_what_is_missing_is_said(calibrated):
    code, prior, test = calibrated
    answers, plans = (
        jnp.zeros((N, 1, 2)),
        jax.tree.map(lambda leaf: leaf[None], jc.allocation.plan(code, jnp.zeros((K, 2)), prior=prior)),
    )
    with pytest.raises(ValueError, match=r"no baseline; expected jaxcode\.robust\.calibrate"):
        TEST(code, answers, ALL, plans=plans)
    with pytest.raises(ValueError, match="no prior"):
        test(code, answers, ALL)
    with pytest.raises(ValueError, match="baseline has 20 pairs; expected one for each of 18 workers"):
        test(jc.ReplicationCode(9, 18), jnp.zeros((18, 1, 2)), np.ones(18, bool))
    with pytest.raises(ValueError, match="memory is 1"):
        SequentialTest(memory=1.0)
    with pytest.raises(ValueError, match="x has 90 inputs; expected at least 10 groups of 10"):
        calibrate(network, code, jnp.zeros((90, 2)), prior)


# ---- in the coded call and in the server -------------------------------------------------------------------


def make_faulty_model(worker):
    """The batch is all workers' inputs, worker after worker."""

    def model(x):
        is_of_faulty = jnp.arange(x.shape[0])[:, None] // (x.shape[0] // N) == worker
        return jnp.where(is_of_faulty, -1.0, 1.0) * curve(x)

    return model


def test_coded_calls_pass_evidence_on():
    prior = line_surrogate()
    options = {"prior": prior, "stragglers": jc.stragglers.Uniform(3), "defence": TEST}
    predict = jc.coded(make_faulty_model(12), COPIES, **options)
    rng, detection, evidence = np.random.default_rng(0), None, None
    for request in range(30):
        x = rng.normal(size=(K, 2)).astype(np.float32)
        returned = ~np.isin(np.arange(N), rng.choice(N, 3, replace=False))
        results, detection = predict.inspect(x, returned, evidence)
        evidence = detection.evidence
        if request == 1:
            num_programs = jc._coded._run._cache_size()
    assert jc._coded._run._cache_size() == num_programs
    assert not detection.flagged[np.arange(N) != 12].any()
    assert detection.score[12] >= 1 or not returned[12]
    exact = np.asarray(predict.exact(x, detection.trusted))
    np.testing.assert_allclose(results[exact], curve(x)[exact], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="evidence is given, but defence is None"):
        jc.coded(curve, COPIES).inspect(x, returned, evidence)


def test_a_server_finds_the_worker_of_its_pool_that_is_faulty(caplog):
    def lie(worker, compute, batch):
        answer = compute(batch)
        return -answer if worker == 2 else answer

    rng = np.random.default_rng(1)
    with ThreadPool(curve, 10, interceptor=lie) as pool:
        server = jc.CodedServer(
            jc.ReplicationCode(5, 10),
            pool,
            stop.answers(10),
            prior=line_surrogate(),
            stragglers=jc.stragglers.Uniform(2),
            defence=TEST,
        )
        server.warm_up(np.zeros((5, 2), np.float32))
        with caplog.at_level(logging.WARNING, "jaxcode.serving"):
            for _ in range(40):
                x = rng.normal(size=(5, 2)).astype(np.float32)
                prediction = server(x)
                assert np.abs(prediction.values - curve(x))[prediction.exact].max(initial=0) < 1e-5 or not any(
                    record.kind == "flagged" for record in caplog.records
                )
        flagged = [record for record in caplog.records if record.kind == "flagged"]
        assert {record.worker for record in flagged} == {2}
        # An answer of two that differ is no exact result, whoever is right.
        assert not prediction.exact[~prediction.detection.trusted[:5] & (prediction.returned[:5])].any()
