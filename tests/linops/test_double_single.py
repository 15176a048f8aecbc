"""Float64 numbers as pairs of float32 numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode.linops import DoubleSingle, in_float64, split
from jaxcode.linops.double_single import as_arguments

NUMBERS = np.random.default_rng(0).normal(size=5) * 10.0 ** np.arange(-2, 3)


@pytest.mark.parametrize("x64", [False, True])
def test_digits_are_kept_through_jit(x64):
    with jax.enable_x64(x64):
        pair = jax.jit(lambda pair: pair)(as_arguments(as_arguments(split(NUMBERS))))
        assert isinstance(pair, DoubleSingle)
        assert pair.hi.dtype == (jnp.float64 if x64 else jnp.float32)
        combined = jax.jit(lambda pair: pair.combine())(pair)
        np.testing.assert_allclose(np.asarray(combined), NUMBERS, rtol=0 if x64 else 1e-14)


def test_derivatives_pass_through():
    """With x64 off, where the pair's parts are float32, the derivative of the sum is each part's own."""
    with jax.enable_x64(True):
        numbers = jnp.asarray(NUMBERS)
    pair = split(numbers)
    sum_of_squares = in_float64(lambda values: jnp.sum(values**2))
    gradient = jax.grad(lambda pair: sum_of_squares(pair.combine()).astype(jnp.float32))(pair)
    np.testing.assert_allclose(gradient.hi, 2 * NUMBERS, rtol=1e-6)
    np.testing.assert_allclose(gradient.lo, 2 * NUMBERS, rtol=1e-6)
