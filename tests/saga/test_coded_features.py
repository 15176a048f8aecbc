"""Tests a last layer trained on features from coded workers, some of which did not return."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import jaxcode as jc
from jaxcode import saga

RIDGE = 0.01


class Features(nnx.Module):
    """Computes all layers of a network but the last."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 96, rngs=rngs)
        self.second = nnx.Linear(96, 32, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.second(nnx.tanh(self.first(x))))


def test_the_optimum_is_the_one_without_stragglers_within_the_decoding_error():
    images, labels = load_digits(return_X_y=True)
    x = (images[:1600] / 8 - 1).astype(np.float32)
    labels = labels[:1600]
    model = Features(nnx.Rngs(0))
    exact = np.asarray(model(jnp.asarray(x)), np.float64)
    reference = LogisticRegression(C=1 / (RIDGE * 1600), fit_intercept=False, tol=1e-10, max_iter=5000)
    optimum = reference.fit(exact, labels).coef_.T

    def train(num_workers, num_stragglers):
        """Trains by SAGA on eight machines, on features decoded batch by batch from the workers that returned."""
        code = jc.SplineCode.systematic(20, num_workers)
        predict = jc.coded(model, code, order=jc.ordering.greedy)
        keys = jax.random.split(jax.random.key(1), 4)
        batches = [
            predict(jnp.asarray(part), jc.stragglers.Uniform(num_stragglers).sample(key, num_workers))
            for key, part in zip(keys, np.split(x, 4), strict=True)
        ]
        features = np.concatenate([np.asarray(batch, np.float64) for batch in batches])
        with jax.enable_x64(True):
            method = saga.DistributedSaga(saga.multinomial, 8, 64, RIDGE)
            state = method.init(jnp.zeros((32, 10)), (features, labels))
            state, _ = method.run(state, jax.random.key(0), 200, every=200, progress=False)
            # The gradient of the coded problem at the optimum of the exact one.
            gradient = jax.grad(lambda w: method.objective(w, state))(jnp.asarray(optimum))
        error = np.sqrt(np.mean(np.sum((features - exact) ** 2, axis=1)))
        return np.asarray(state.params), float(jnp.linalg.norm(gradient)), error

    params, _, error = train(30, 0)
    assert error < 1e-4
    np.testing.assert_allclose(params, optimum, atol=1e-3)
    params, gradient_norm, error = train(60, 10)
    # Some features were decoded from other workers.
    assert error > 1e-3
    distance = np.linalg.norm(params - optimum)
    # The objective's curvature is at least the ridge.
    assert distance <= 1.01 * gradient_norm / RIDGE
    # Softmax's residuals are at most sqrt(2) long, and change by half the change of logits.
    length = np.sqrt(np.mean(np.sum(exact**2, axis=1)))
    assert gradient_norm <= (np.sqrt(2) + 0.5 * np.linalg.norm(optimum, 2) * length) * error
    agreement = np.mean(np.argmax(exact @ params, axis=1) == np.argmax(exact @ optimum, axis=1))
    assert agreement > 0.99
