"""Masks of the workers that return."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxcode import stragglers as sg

from .cases import EXPONENTIAL, SMALLEST_P_VALUE, WRONG_TYPE, draw


def z_score(count, num_trials, probability):
    return (count - num_trials * probability) / np.sqrt(num_trials * probability * (1 - probability))


@pytest.mark.parametrize("num_stragglers", [0, 1, 4, 5])
def test_uniform_has_exactly_s_stragglers(num_stragglers):
    masks = draw(sg.Uniform(num_stragglers), jax.random.key(0), 5)
    assert (masks.sum(1) == 5 - num_stragglers).all()


@pytest.mark.parametrize("model", [sg.Uniform(2), sg.FirstToAnswer(EXPONENTIAL, 3)], ids=["uniform", "first"])
def test_every_set_is_equally_likely(model):
    masks = np.asarray(draw(model, jax.random.key(0), 5))
    sets, counts = np.unique(masks, axis=0, return_counts=True)
    assert len(sets) == 10
    assert scipy.stats.chisquare(counts).pvalue > SMALLEST_P_VALUE


@pytest.mark.parametrize("probability", [0.02, 0.5, 0.9])
def test_independent_is_binomial(probability):
    late = 30 - np.asarray(draw(sg.Independent(probability), jax.random.key(0)).sum(1))
    assert abs(z_score(late.sum(), 30 * late.size, probability)) < 3.3
    # The number of late workers varies as a binomial does only if workers are independent.
    variance = 30 * probability * (1 - probability)
    statistic = (late.size - 1) * late.var(ddof=1) / variance
    p_value = 2 * min(f(statistic, late.size - 1) for f in (scipy.stats.chi2.cdf, scipy.stats.chi2.sf))
    assert p_value > SMALLEST_P_VALUE


@pytest.mark.parametrize("probability", [0, 1])
def test_independent_at_its_ends(probability):
    assert (draw(sg.Independent(probability), jax.random.key(0)) == (probability == 0)).all()


@pytest.mark.parametrize("num_answers", [1, 7, 30])
def test_first_to_answer_is_the_shortest_of_the_same_draw(num_answers):
    key = jax.random.key(3)
    seconds = np.asarray(EXPONENTIAL.sample(key, 30))
    returned = np.asarray(sg.FirstToAnswer(EXPONENTIAL, num_answers).sample(key, 30))
    np.testing.assert_array_equal(np.flatnonzero(returned), np.sort(np.argsort(seconds)[:num_answers]))


def test_ties_leave_exactly_num_answers_and_favour_no_worker():
    masks = np.asarray(draw(sg.FirstToAnswer(sg.Empirical([1.0, 1.0]), 3), jax.random.key(0)))
    assert (masks.sum(1) == 3).all()
    largest = np.abs(z_score(masks.sum(0), len(masks), 3 / 30)).max()
    assert largest < scipy.stats.norm.isf(SMALLEST_P_VALUE / (2 * 30))


def test_dead_workers_never_return():
    half_dead = sg.Empirical([1.0, np.inf])
    alive = jnp.isfinite(draw(half_dead, jax.random.key(0)))
    masks = draw(sg.FirstToAnswer(half_dead, 15), jax.random.key(0))
    assert not (masks & ~alive).any()
    np.testing.assert_array_equal(masks.sum(1), np.minimum(15, alive.sum(1)))
    np.testing.assert_array_equal(draw(sg.Deadline(half_dead, np.inf), jax.random.key(0)), alive)


def test_deadline_is_a_threshold_on_the_same_draw_and_is_inclusive():
    key = jax.random.key(3)
    seconds = EXPONENTIAL.sample(key, 31)
    deadline = jnp.median(seconds)
    returned = sg.Deadline(EXPONENTIAL, deadline).sample(key, 31)
    np.testing.assert_array_equal(returned, seconds <= deadline)
    assert returned.sum() == 16


def test_new_parameters_do_not_recompile():
    jitted = jax.jit(lambda model, key: model.sample(key, 30).sum())
    returned = [jitted(sg.Uniform(num_stragglers), jax.random.key(0)) for num_stragglers in (0, 5, 30)]
    assert returned == [30, 25, 0]
    assert jitted._cache_size() == 1


@pytest.mark.parametrize(
    ("name", "model"),
    [("num_stragglers", sg.Uniform(40)), ("num_answers", sg.FirstToAnswer(EXPONENTIAL, jnp.asarray(40)))],
)
def test_more_than_all_workers_are_refused(name, model):
    with pytest.raises(ValueError, match=rf"{name} is .*40.*; expected .* at most num_workers=30: give 30"):
        model.sample(jax.random.key(0), num_workers=30)


def test_a_traced_count_must_still_be_an_integer():
    with pytest.raises(WRONG_TYPE, match="num_stragglers"):
        jax.jit(lambda count: sg.Uniform(count).sample(jax.random.key(0), 3))(1.5)
