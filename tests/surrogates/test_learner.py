"""Surrogates that go on learning: they get better, know how good they are, keep little, and survive what is wrong."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcode as jc
from jaxcode.surrogates import Learner

from .cases import curve, line_surrogate

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(3, 4)).astype(np.float32)
X = RNG.uniform(-1, 1, (1500, 3)).astype(np.float32)


def classify(x):
    return 2 * jnp.tanh(2 * jnp.sin(2 * x @ WEIGHTS))


def network():
    return nnx.Sequential(nnx.Linear(3, 32, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(32, 4, rngs=nnx.Rngs(1)))


def squared_error(prior, x):
    return float(jnp.mean(jnp.square(prior(x) - classify(x))))


def learn(prior, x, *, size=100, f=classify, **options):
    with Learner(prior, **options) as learner:
        for start in range(0, len(x), size):
            learner.observe(x[start : start + size], f(x[start : start + size]))
            assert learner.wait(120.0)
    return learner


@pytest.mark.parametrize("kind", ["ridge", "network"])
def test_it_gets_better_and_knows_how_good_it_is(kind):
    options = {"model": network()} if kind == "network" else {"cost": 1000.0}
    prior = jc.surrogate(classify, X[:100], progress=False, **options)
    learner = learn(prior, X[100:1300], least_new=100)
    tests = np.random.default_rng(1).uniform(-1, 1, (2000, 3)).astype(np.float32)
    after = learner.surrogate
    assert squared_error(after, tests) < 0.7 * squared_error(prior, tests)
    assert learner.counters()["improved"] >= 2
    assert learner.counters()["squared_error"] == pytest.approx(
        squared_error(after, tests) / float(jnp.var(classify(tests))), rel=0.7
    )
    # Some of the guesses that it is calibrated by are those of surrogates that knew less.
    assert 0.8 < float(after.with_risk(tests)[1].mean()) / squared_error(after, tests) < 4
    wrong = float(np.mean(np.argmax(after(tests), 1) != np.argmax(classify(tests), 1)))
    assert float(after.with_risk(tests, "disagreement")[1].mean()) == pytest.approx(wrong, abs=0.1)
    # The same structure: a server that compiled for the first goes on.
    assert str(jax.tree.map(jnp.shape, after)) == str(jax.tree.map(jnp.shape, prior))
    assert after.cost == prior.cost


def test_a_model_that_changes_is_followed():
    """Its answers are negated: the guesses that were good are bad, of which expected losses tell before it learns."""
    prior = jc.surrogate(classify, X[:300], model=network(), progress=False)

    def negated(x):
        return -classify(x)

    with Learner(prior, capacity=512, least_new=200) as learner:
        learner.observe(X[:200], negated(X[:200]))
        assert learner.wait(120.0)
        told = float(learner.surrogate.with_risk(X[300:600])[1].mean())
        assert told == pytest.approx(float(np.mean((prior(X[300:600]) - negated(X[300:600])) ** 2)), rel=0.3)
    learner = learn(prior, np.tile(X[:400], (8, 1)), f=negated, size=200, capacity=512, least_new=200)
    after = float(jnp.mean((learner.surrogate(X[300:600]) - negated(X[300:600])) ** 2))
    assert after < 0.5 * told


def test_the_latest_answers_are_kept_and_no_more():
    with Learner(line_surrogate(), capacity=200, least_new=100) as learner:
        for number in range(7):
            x = np.full((90, 2), number, np.float32)
            learner.observe(x, curve(x))
            assert learner.wait(120.0)
        rows, _ = learner._memory._rows
        assert rows.shape == (200, 2)
        assert sorted(np.unique(rows[:, 0])) == [4, 5, 6]
        learner.observe(np.zeros((1000, 2), np.float32), np.zeros((1000, 2), np.float32))
        assert learner.wait(120.0)
        assert learner.counters()["observed"] == 7 * 90 + 1000


def test_what_is_not_finite_is_not_learned_from():
    with Learner(line_surrogate(), least_new=20) as learner:
        x = np.ones((30, 2), np.float32)
        x[:11] = np.nan
        learner.observe(x, np.ones((30, 2)))
        assert learner.counters()["observed"] == 19
        learner.observe(x[:11], np.ones((11, 2)))
        assert learner.counters()["observed"] == 19
        assert np.isnan(learner.counters()["squared_error"])


def test_a_round_that_fails_is_logged_and_the_surrogate_stays(monkeypatch, caplog):
    def fail(*_):
        raise MemoryError("too little")

    monkeypatch.setattr(Learner, "_improve", fail)
    prior = line_surrogate()
    with caplog.at_level(logging.ERROR, "jaxcode.surrogates"):
        learner = learn(prior, X[:400, :2], least_new=100, f=curve)
    assert learner.surrogate.predictor is prior.predictor
    assert "a round of learning failed" in caplog.text
    assert learner.counters()["rounds"] == 4


def test_after_it_is_closed_nothing_is_learned():
    learner = learn(line_surrogate(), X[:200, :2], least_new=100, f=curve)
    rounds = learner.counters()["rounds"]
    learner.observe(X[:300, :2], curve(X[:300, :2]))
    assert learner.wait(5.0)
    assert learner.counters()["rounds"] == rounds
    learner.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Learner(curve), "prior is .*expected a surrogate"),
        (lambda: Learner(line_surrogate(), capacity=100), "capacity is 100; expected .*512"),
        (lambda: Learner(line_surrogate(), least_new=1), "least_new is 1"),
        (lambda: Learner(line_surrogate()).observe(X[:3, :2], np.ones((2, 2))), "answers has 2 rows.*3 inputs"),
        (lambda: Learner(line_surrogate()).observe(X[:3, :2], np.ones((3, 5))), r"answers have shapes .*\(5,\)"),
    ],
)
def test_bad_arguments(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()
