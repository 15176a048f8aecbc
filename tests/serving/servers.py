"""Makes the servers that tests of predictions and of serving share."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcode import CodedServer, SplineCode

CODE = SplineCode.systematic(5, 12)
X = np.random.default_rng(0).normal(size=(17, 4)).astype(np.float32)


def f(x):
    return {"logits": jnp.tanh(x @ jnp.ones((4, 3)) / 2), "norm": jnp.sum(x**2, axis=-1)}


def make_server(pool, policy, code=CODE, **options):
    return CodedServer(code, pool, policy, **{"predict_error": False, **options})


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
