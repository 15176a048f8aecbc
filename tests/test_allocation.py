"""Who gets the redundant workers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxcode as jc
from jaxcode import allocation
from jaxcode.stragglers import Independent, Uniform

from .surrogates.cases import line_surrogate

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("num_workers", "num_late"), [(4, 0), (9, 1), (30, 5), (100, 60), (5, 5)])
def test_lost_probabilities_of_uniform_stragglers_are_hypergeometric(num_workers, num_late):
    """All of c given workers are late if c draws without replacement are."""
    found = allocation.lost_probability(Uniform(num_late), num_workers)
    counts = np.arange(num_workers + 1)
    expected = stats.hypergeom.pmf(counts, num_workers, num_late, counts)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_lost_probabilities_of_independent_stragglers_are_powers():
    found = allocation.lost_probability(Independent(0.3), 40, jax.random.key(1))
    np.testing.assert_allclose(found[:4], 0.3 ** np.arange(4), atol=0.01)


@pytest.mark.parametrize("num_late", [1, 2, 4])
def test_assignments_have_the_least_expected_loss(num_late):
    """Against all ways to distribute the copies."""
    num_data, num_workers = 4, 7
    lost = np.asarray(allocation.lost_probability(Uniform(num_late), num_workers))
    for _ in range(20):
        risk = np.float32(RNG.uniform(size=num_data) ** 3)
        assignment = np.asarray(allocation.assign(risk, lost))
        np.testing.assert_array_equal(assignment[:num_data], np.arange(num_data))
        found = np.sum(risk * lost[np.bincount(assignment, minlength=num_data)])
        counts = [c for c in itertools.product(range(1, num_workers), repeat=num_data) if sum(c) == num_workers]
        best = min(np.sum(risk * lost[list(c)]) for c in counts)
        np.testing.assert_allclose(found, best, rtol=1e-5)


def test_guessing_may_leave_inputs_without_a_worker():
    lost = np.asarray(allocation.lost_probability(Uniform(1), 6))
    risk = np.array([0.5, 1e-6, 0.4, 1e-6, 0.3], np.float32)
    guessed = np.bincount(allocation.assign(risk, lost, may_guess=True), minlength=5)
    assert guessed[[1, 3]].sum() == 0
    assert guessed.sum() == 6
    with pytest.raises(ValueError, match="lost is for 6 workers and risk for 7 inputs"):
        allocation.assign(np.ones(7, np.float32), lost)


@pytest.mark.parametrize("risk", [0.0, 0.2, 1.0, np.inf])
@pytest.mark.parametrize(("num_data", "num_workers"), [(5, 12), (20, 30), (3, 3)])
def test_equal_risks_are_assigned_as_replication_does(num_data, num_workers, risk):
    lost = allocation.lost_probability(Uniform(2), num_workers)
    assignment = allocation.assign(np.full(num_data, risk, np.float32), lost)
    np.testing.assert_array_equal(assignment, jc.ReplicationCode(num_data, num_workers).assignment())


def test_a_risk_that_is_nan_is_the_largest():
    lost = allocation.lost_probability(Uniform(1), 4)
    np.testing.assert_array_equal(allocation.assign(np.array([9.0, np.nan, 0.0], np.float32), lost), [0, 1, 2, 1])


def test_new_risks_do_not_recompile():
    lost = allocation.lost_probability(Uniform(2), 12)
    assign = jax.jit(allocation.assign)
    for seed in range(3):
        assign(jax.random.uniform(jax.random.key(seed), (5,)), lost)
    assert assign._cache_size() == 1
    together = jax.vmap(assign, (0, None))(jnp.eye(5), lost)
    np.testing.assert_array_equal(together[2], assign(jnp.eye(5)[2], lost))


@pytest.mark.parametrize(("size", "num_data"), [(12, 4), (13, 4), (3, 4), (400, 20), (1, 1)])
def test_groups_get_equal_shares_of_the_risk(size, num_data):
    risk = np.float32(RNG.uniform(size=size) ** 2)
    order = np.asarray(allocation.spread(risk, num_data))
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    shares = risk[order[: size // num_data * num_data]].reshape(-1, num_data).sum(axis=1)
    # No group can be out by more than the riskiest input.
    assert size % num_data or np.ptp(shares) <= risk.max()


@pytest.mark.usefixtures("unchecked")
def test_plans_are_refused_where_they_make_no_sense():
    x, prior, code = jnp.ones((5, 2)), line_surrogate(), jc.ReplicationCode(5, 8)
    with pytest.raises(ValueError, match="prior is <function"):
        allocation.plan(code, x, prior=lambda x: x)
    with pytest.raises(ValueError, match="stragglers is given for InterpolatingCode"):
        allocation.plan(jc.SplineCode.systematic(5, 8), x, prior=prior, stragglers=Uniform(1))
    with pytest.raises(ValueError, match="loss is 'accuracy'; expected one that this prior estimates: squared_error"):
        allocation.plan(code, x, prior=prior, loss="accuracy")
    with pytest.raises(ValueError, match="x has 4 inputs; expected a group of num_data, 5"):
        allocation.plan(code, x[:4], prior=prior)
    with pytest.raises(ValueError, match="stragglers is 5"):
        allocation.lost_probability(5, 8)
