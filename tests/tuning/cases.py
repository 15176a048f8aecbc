"""Models, inputs and straggler sets that the tests of tuning share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcode import metrics, stragglers, tuning

K, N, S = 5, 8, 2
LATE = stragglers.Uniform(S)
WEIGHTS = jnp.asarray(np.random.default_rng(7).normal(size=(4, 3)), jnp.float32)
tune = functools.partial(tuning.tune, progress=False)
# All of a sample of sixty inputs is one batch.
tune_classes = functools.partial(tune, loss="disagreement", batch_size=60)


def inputs(size=60, seed=0, features=4):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(size, features)), jnp.float32)


def smooth_classifier(x):
    return jnp.tanh(x @ WEIGHTS) @ jnp.eye(3)


def hash_classifier(x):
    """Gives classes that have nothing to do with where an input lies."""
    return jnp.sin(1e4 * (x @ WEIGHTS))


def sample_masks(count, seed=1, num_stragglers=S, num_workers=N):
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.vmap(lambda key: stragglers.Uniform(num_stragglers).sample(key, num_workers))(keys)


def mean_loss(predict, f, x, masks):
    return np.mean([1 - float(metrics.agreement(predict(x, mask), f(x))) for mask in masks])


def root_mean_square(predict, f, x, masks):
    errors = [float(metrics.rmse(predict(x, mask), f(x))) for mask in masks]
    return np.sqrt(np.mean(np.square(errors)))
