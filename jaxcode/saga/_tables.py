"""Updates tables of gradients: compensated sums, and minibatches that contain a sample twice."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer, PyTree


def compensated_add(
    total: PyTree[Array], compensation: PyTree[Array], change: PyTree[Array]
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Returns total + compensation + change as a rounded sum and what rounding left out of it."""
    total, error = two_sum(total, change)
    return two_sum(total, jax.tree.map(jnp.add, compensation, error))


def two_sum(a: PyTree[Array], b: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
    """Returns the rounded sum of two numbers and its rounding error, exactly.

    References:
        Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    """
    total = jax.tree.map(jnp.add, a, b)

    def error(a, b, total):
        b_part = total - a
        return (a - (total - b_part)) + (b - b_part)

    return total, jax.tree.map(error, a, b, total)


def first_occurrences(index: Integer[Array, "b"]) -> Bool[Array, "b"]:
    """Returns where a number occurs for the first time: a sample drawn twice is one entry of the table."""
    return jnp.argmax(index[:, None] == index[None], axis=1) == jnp.arange(index.size)


def append_axes(factors: Array, leaf: Array) -> Array:
    """Reshapes factors of a leaf's leading axes so that they broadcast against the leaf."""
    return factors.reshape(factors.shape + (1,) * (leaf.ndim - factors.ndim))
