import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy.interpolate import make_smoothing_spline

from jaxcode.splines import gcv_score, gcv_smoothing


def noisy(n, seed=0, features=1):
    rng = np.random.default_rng(seed)
    knots = np.sort(rng.uniform(-1, 1, n))
    return knots, np.sin(4 * knots)[:, None] * np.arange(1, features + 1) + 0.2 * rng.normal(size=(n, features))


def scipys_score(knots, values, smoothing):
    def fit(y):
        return make_smoothing_spline(knots, y, lam=smoothing)(knots)

    residuals = values - np.stack([fit(y) for y in values.T], axis=1)
    smoother = np.stack([fit(y) for y in np.eye(len(knots))], axis=1)
    return len(knots) * np.sum(residuals**2) / (len(knots) - np.trace(smoother)) ** 2


@pytest.mark.parametrize("smoothing", [1e-6, 1e-3, 1.0])
def test_the_score_is_that_of_scipys_splines(smoothing):
    knots, values = noisy(30, features=2)
    found = gcv_score(knots, jnp.asarray(values), smoothing=smoothing)
    np.testing.assert_allclose(found, scipys_score(knots, values, smoothing), rtol=1e-5)


@pytest.mark.parametrize("n", [12, 60])
def test_the_smoothing_is_where_scipys_score_is_lowest(n):
    knots, values = noisy(n)
    returned = np.random.default_rng(1).random(n) < 0.8
    # What is not there is not read.
    shown = jnp.asarray(np.where(returned[:, None], values, np.nan))
    found = float(gcv_smoothing(knots, shown, returned=returned))

    def score(log_smoothing):
        return scipys_score(knots[returned], values[returned], np.exp(log_smoothing))

    around = optimize.minimize_scalar(score, bounds=(np.log(found) - 1, np.log(found) + 1), method="bounded")
    assert score(np.log(found)) <= around.fun * (1 + 1e-7)
    grid = np.linspace(np.log(1e-9), np.log(1e2), 40)
    assert score(np.log(found)) <= min(map(score, grid)) * (1 + 1e-7)


def test_equal_knots_count_as_often_as_they_occur():
    knots, values = noisy(16)
    twice, both = np.repeat(knots, 2), jnp.asarray(np.concatenate([values - 0.1, values + 0.3], axis=1).reshape(-1, 1))
    smoother = np.stack([make_smoothing_spline(knots, y, w=np.full(16, 2.0), lam=0.01)(knots) for y in np.eye(16)], 1)
    of_both = np.kron(smoother, np.full((2, 2), 0.5))
    residual = np.asarray(both) - of_both @ np.asarray(both)
    expected = 32 * np.sum(residual**2) / (32 - np.trace(of_both)) ** 2
    np.testing.assert_allclose(gcv_score(twice, both, smoothing=0.01), expected, rtol=1e-5)


def test_derivatives_are_those_of_the_minimum():
    knots, values = noisy(20)
    with jax.enable_x64(True):
        values = jnp.asarray(values)

        @jax.jit
        def log_smoothing(values):
            return jnp.log(gcv_smoothing(knots, values))

        gradient = jax.grad(log_smoothing)(values)
        step = jnp.asarray(np.random.default_rng(2).normal(size=values.shape)) * 1e-5
        difference = (log_smoothing(values + step) - log_smoothing(values - step)) / 2
        np.testing.assert_allclose(jnp.sum(gradient * step), difference, rtol=1e-4)


def test_batched_masks_and_narrow_data():
    knots, values = noisy(20)
    masks = np.random.default_rng(3).random((3, 20)) < 0.7
    values = jnp.asarray(values, jnp.float32)
    batched = jax.vmap(lambda mask: gcv_smoothing(knots, values, returned=mask))(jnp.asarray(masks))
    alone = [gcv_smoothing(knots, values, returned=mask) for mask in masks]
    np.testing.assert_allclose(batched, alone, rtol=1e-3)
    assert batched.dtype == jnp.float32

    def log_smoothing(values, mask):
        return jnp.log(gcv_smoothing(knots, values, returned=mask))

    gradients = jax.jit(jax.vmap(jax.grad(log_smoothing), (None, 0)))(values, jnp.asarray(masks))
    np.testing.assert_allclose(gradients[0], jax.grad(log_smoothing)(values, masks[0]), rtol=1e-2, atol=1e-3)


def test_two_answers_lie_on_a_line():
    knots, values = noisy(5)
    two = np.array([True, False, False, True, False])
    assert float(gcv_smoothing(knots, jnp.asarray(values), returned=two)) == 0
    assert np.isnan(gcv_score(knots, jnp.asarray(values), smoothing=1.0, returned=two))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"knots": np.array([1.0, 0.0, 2.0])}, "knots.*ascending"),
        ({"values": jnp.ones(4)}, "values has shape .* 3 knots"),
        ({"returned": np.ones(3)}, "returned has dtype"),
    ],
)
def test_bad_arguments(unchecked, arguments, message):
    good = {"knots": np.arange(3.0), "values": jnp.ones(3), "returned": np.ones(3, bool)} | arguments
    with pytest.raises(ValueError, match=message):
        gcv_smoothing(good["knots"], good["values"], returned=good["returned"])
