"""What SAGA's tables are kept with: sums of many small numbers, minibatches that name a sample twice."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer, PyTree


def add(total: PyTree[Array], rest: PyTree[Array], change: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
    """The sum total + rest + change, as its leading part and what is too small to be seen beside it."""
    sums, lost = exact_sum(total, change)
    return exact_sum(sums, jax.tree.map(jnp.add, rest, lost))


def exact_sum(a: PyTree[Array], b: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
    """The sum of two numbers, rounded, and what rounding has left out.

    References:
        Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    """
    sums = jax.tree.map(jnp.add, a, b)

    def lost(a, b, sums):
        of_b = sums - a
        return (a - (sums - of_b)) + (b - of_b)

    return sums, jax.tree.map(lost, a, b, sums)


def first_of_each(index: Integer[Array, "b"]) -> Bool[Array, "b"]:
    """Where a sample is named for the first time: one that is there twice is one entry of the table."""
    return jnp.argmax(index[:, None] == index, axis=1) == jnp.arange(index.size)


def along(factors: Array, leaf: Array) -> Array:
    """Numbers of the leading axes, in a shape that meets the leaf's."""
    return factors.reshape(factors.shape + (1,) * (leaf.ndim - factors.ndim))
