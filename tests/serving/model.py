"""A model for `tests.serving.test_http`, imported by the processes that serve it."""

import time

import jax
import jax.numpy as jnp
import numpy as np


def scores(x):
    """Computes scores; takes two seconds where an input starts with 9."""
    assert x.shape[-1] == 4, "four numbers an input"

    def wait(first):
        time.sleep(2.0 if np.any(np.isclose(first, 9)) else 0.0)
        return np.zeros((), np.float32)

    pause = jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), x[..., 0])
    return jnp.tanh(x @ jnp.ones((4, 3)) / 4) + pause
