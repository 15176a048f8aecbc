"""The pipeline's own parts: groups there and back, and codes whose operators are of another size."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import InterpolatingCode, SplineCode, outputs, pipeline

CODE = SplineCode.systematic(5, 12)


@pytest.mark.parametrize("size", [1, 5, 11, 20])
@pytest.mark.parametrize("order", [None, lambda x, num_data: jnp.arange(len(x) - 1, -1, -1)], ids=["none", "reverse"])
def test_ungroup_inverts_group(size, order):
    x = jnp.asarray(np.random.default_rng(size).normal(size=(size, 2, 3)), jnp.float32)
    grouped, grouping = pipeline.group(x, 5, order)
    chex.assert_shape(grouped, (5, -(-size // 5), 2, 3))
    np.testing.assert_array_equal(pipeline.ungroup(grouped, grouping), x)


def test_consecutive_inputs_are_in_one_group():
    grouped, _ = pipeline.group(jnp.arange(10), 5, None)
    np.testing.assert_array_equal(grouped, [[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]])


def test_operators_of_another_size_are_refused(monkeypatch):
    """A user's own code may prepare an operator that does not fit its numbers of inputs and workers."""
    smaller = SplineCode.systematic(5, 11).encoder_linop()
    with monkeypatch.context() as patch:
        patch.setattr(InterpolatingCode, "encoder_linop", lambda self, plan=None: smaller)
        with pytest.raises(AssertionError, match="12"):
            pipeline.encode(CODE, None, jnp.ones((5, 2, 3)))
    fewer = SplineCode.systematic(4, 12).decoder_linop(np.ones(12, bool))
    with pytest.raises(AssertionError, match="5"):
        pipeline.decode(CODE, fewer, jnp.ones((12, 2, 3)), outputs.as_returned)
