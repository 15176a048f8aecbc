"""What goes from the encoder of a group to its decoder: assignments of inputs to workers, prior means, features."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcode as jc
from jaxcode import checks, linops

from .cases import CODES, normal

K, N = 5, 12
CODE = jc.ReplicationCode(K, N)
RETURNED = np.arange(N) % 4 != 1
INTERPOLATING = ["spline-smoothed", "berrut-chebyshev", "lagrange-2-repeated"]


@jc.pytree("num_data", "num_workers")
class WeightedCode(jc.AbstractCode):
    """Has every worker compute a weighted mean of all inputs, with weights that the plan's features give."""

    num_data: int
    num_workers: int
    nodes: ClassVar[None] = None
    predicts_error: ClassVar[bool] = False

    def encoder_linop(self, plan=None):
        return linops.Dense(linops.split(self._weights(plan)))

    def decoder_linop(self, returned, plan=None):
        checks.check_mask("returned", returned, self.num_workers)
        weights = jnp.where(jnp.asarray(returned)[:, None], self._weights(plan), 0)
        return linops.Dense(linops.split(jnp.linalg.pinv(weights)), returned)

    def recovered(self, returned, plan=None):
        return jnp.broadcast_to(jnp.sum(jnp.asarray(returned)) >= self.num_data, (self.num_data,))

    def exact(self, returned, plan=None):
        return self.recovered(returned)

    def _weights(self, plan):
        places = jnp.linspace(0.0, 1.0, self.num_workers)[:, None]
        return jax.nn.softmax(-10 * jnp.abs(places - plan.features[None]), axis=1)


def assign_by_size(code, group):
    """Gives the spare workers to the largest inputs."""
    largest_first = jnp.argsort(-jnp.sum(group**2, axis=-1)).astype(jnp.int32)
    return jc.Plan(assignment=jnp.concatenate([jnp.arange(K, dtype=jnp.int32), jnp.resize(largest_first, N - K)]))


def prior_of_line(code, group):
    """Prior means from a straight line, as a cheap model gives them."""
    workers = code.encode(group) if code.nodes is not None else group[code.assignment()]
    return jc.Plan(prior=jc.Prior(2 * workers, 2 * group))


def plan_features(code, group):
    return jc.Plan(features=jnp.linspace(0.0, 1.0, code.num_data) + 0 * group[:, 0])


def curve(x):
    return jnp.sin(x) + 2 * x


def test_replication_follows_the_plan():
    x, served = normal(K, 2), np.array([4, 4, 4, 0, 1, 2, 3, 3, 0, 1, 2, 4])
    plan = jc.Plan(assignment=served)
    sent = CODE.encode(x, plan)
    np.testing.assert_array_equal(sent, x[served])
    returned = np.isin(np.arange(N), [2, 3, 8, 5])
    recovered = np.isin(np.arange(K), served[returned])
    np.testing.assert_array_equal(CODE.recovered(returned, plan), recovered)
    for decode in (CODE.decode, jax.jit(CODE.decode)):
        results = np.asarray(decode(sent, returned, plan))
        np.testing.assert_array_equal(results[recovered], x[recovered])
        assert np.isnan(results[~recovered]).all()


def test_an_assignment_may_leave_inputs_out():
    plan = jc.Plan(assignment=np.zeros(N, int))
    np.testing.assert_array_equal(CODE.recovered(np.ones(N, bool), plan), np.arange(K) == 0)


def test_lost_inputs_get_their_prior_means():
    x, code = normal(K, 2), jc.UncodedCode(K)
    prior = jc.Prior(workers=np.full((K, 2), 7, np.float32), data=np.full((K, 2), 7, np.float32))
    results = code.decode(code.encode(x), np.arange(K) != 2, jc.Plan(prior=prior))
    np.testing.assert_array_equal(results[2], [7, 7])
    np.testing.assert_allclose(np.delete(results, 2, 0), np.delete(x, 2, 0), atol=1e-5)


@pytest.mark.parametrize("name", INTERPOLATING)
def test_decoders_decode_what_the_prior_does_not_explain(name):
    """A prior that is right leaves nothing to decode; one of zeros changes nothing."""
    code, x, returned = CODES[name], normal(K, 2), RETURNED
    sent = code.encode(x)
    right = jc.Plan(prior=jc.Prior(curve(sent), curve(x)))
    np.testing.assert_allclose(code.decode(curve(sent), returned, right), curve(x), rtol=1e-6, atol=1e-6)
    zero = jc.Plan(prior=jc.Prior(jnp.zeros((N, 2)), jnp.zeros((K, 2))))
    expected = code.decode(curve(sent), returned)
    np.testing.assert_allclose(code.decode(curve(sent), returned, zero), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", INTERPOLATING)
def test_with_one_answer_all_results_are_prior_means(name):
    code, x = CODES[name], normal(K, 2)
    plan = jc.Plan(prior=jc.Prior(jnp.zeros((N, 2)), jnp.asarray(x)))
    np.testing.assert_array_equal(code.decode(code.encode(x), np.arange(N) == 3, plan), x)


PLANNED = {
    "assignment": (CODE, assign_by_size),
    "prior": (jc.SplineCode.systematic(K, N), prior_of_line),
    "prior of copies": (CODE, prior_of_line),
    "features": (WeightedCode(K, N), plan_features),
}


@pytest.mark.parametrize("case", PLANNED)
def test_coded_plans_every_group(case):
    code, planner = PLANNED[case]
    x = jnp.asarray(normal(2 * K, 2))
    expected = []
    for group in np.split(x, 2):
        plan = planner(code, group)
        expected.append(code.decode(curve(code.encode(group, plan)), RETURNED, plan))
    predict = jc.coded(curve, code, planner=planner)
    found = predict(x, RETURNED)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-4, atol=1e-4)
    masks = np.stack([RETURNED, np.roll(RETURNED, 1)])
    together = jax.jit(jax.vmap(predict, (None, 0)))(x, masks)
    np.testing.assert_allclose(together[0], found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", PLANNED)
def test_derivatives_pass_through_plans(case):
    code, planner = PLANNED[case]

    def loss(x):
        results = jc.coded(curve, code, planner=planner)(x, RETURNED)
        return jnp.sum(jnp.sin(jnp.nan_to_num(results)))

    with jax.enable_x64(True):
        x = jnp.asarray(normal(K, 2, dtype=float))
        gradient = jax.jit(jax.grad(loss))(x)
        direction = np.cos(np.arange(x.size)).reshape(x.shape)
        step = 1e-5
        difference = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(np.sum(gradient * direction), difference, rtol=1e-6, atol=1e-7)
