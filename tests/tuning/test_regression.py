"""Replication whose lost inputs are predicted from the batch's answers, by a process fitted to the sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcode as jc
from jaxcode import outputs, tuning
from jaxcode.stragglers import Uniform
from jaxcode.tuning import regression

K, N, LATE = 8, 9, 1


def draw(seed, count):
    return np.random.default_rng(seed).uniform(size=(count, 2)).astype(np.float32)


def waves(x):
    return jnp.sin(4 * x @ jnp.array([[1.0, 0.5], [-0.5, 1.0]]))


def jumps(x):
    return jnp.where(x > jnp.array([0.5, 0.3]), 1.0, 0.0)


@pytest.mark.parametrize("f", [waves, jumps])
def test_the_process_predicts_best_what_is_left_out(f):
    x = draw(0, 3 * 2 * 6).reshape(3, 6, 2, 2)
    targets = np.asarray(f(x))
    process = regression.fit_by_leaving_out(
        x, targets, np.zeros_like(targets), tuning.squared_error, outputs.as_returned
    )

    def lose(process):
        """Fits to all inputs of each batch but one, from scratch."""
        square = 0.0
        batches = np.float64(x).reshape(3, 12, 2), np.float64(targets).reshape(3, 12, -1)
        for places, values in zip(*batches, strict=True):
            distances = np.sum((places[:, None] - places[None]) ** 2, axis=2)
            covariance = np.asarray(process.correlation(jnp.asarray(distances))) + process.nugget * np.eye(12)
            for i in range(12):
                others = np.arange(12) != i
                weights = np.linalg.solve(covariance[np.ix_(others, others)], covariance[others, i])
                square += np.sum((weights @ values[others] - values[i]) ** 2)
        return square

    best = lose(process)
    for smoothness in (0.5, 2.5, 4.5, 6.5):
        for factor in (0.3, 1.0, 3.0):
            for nugget in (1e-4, 0.1, 1.0):
                other = type(process)(smoothness, process.length * factor, nugget)
                # Lengths of the grid are twice as long as the next.
                assert best < 1.05 * lose(other)


def test_what_cannot_be_predicted_gets_the_mean():
    noise = np.random.default_rng(0).normal(size=(4, 8, 5, 3)).astype(np.float32)
    x = draw(1, 4 * 8 * 5).reshape(4, 8, 5, 2)
    process = regression.fit_by_leaving_out(x, noise, np.zeros_like(noise), tuning.squared_error, outputs.as_returned)
    assert process.nugget >= 3 or process.length < 0.1


def test_small_requests_lose_less_than_by_the_mean(tmp_path):
    tuned = jc.tune(waves, draw(2, 40 * K), K, N, Uniform(LATE), progress=False, num_masks=32)
    assert tuned.code.process is not None, tuned
    tuned.save(tmp_path)
    predict = jc.load_tuned(tmp_path).coded(waves)
    x = draw(3, 40 * K)
    targets = waves(x)
    # The request's last input is lost.
    returned = np.arange(N) != K - 1
    results = jax.jit(jax.vmap(lambda x: predict(x, returned)))(x.reshape(40, K, 2)).reshape(targets.shape)
    is_lost = np.arange(40 * K) % K == K - 1
    np.testing.assert_allclose(results[~is_lost], targets[~is_lost], rtol=1e-5, atol=1e-6)
    error = np.mean((results - targets)[is_lost] ** 2)
    assert error < 0.8 * np.mean((targets.mean(axis=0) - targets)[is_lost] ** 2)
