"""What SAGA's tables are kept with: sums of many small numbers, minibatches that name a sample twice."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer, PyTree


def add(total: PyTree[Array], rest: PyTree[Array], change: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
    """The sum total + rest + change, as its leading part and what is too small to be seen beside it.

    References:
        Knuth, The Art of Computer Programming, volume 2, section 4.2.2 (the two numbers that a + b is exactly).
    """
    seen = jax.tree.map(lambda rest, change: rest + change, rest, change)
    sums = jax.tree.map(lambda total, seen: total + seen, total, seen)

    def lost(total, seen, sums):
        of_seen = sums - total
        return (total - (sums - of_seen)) + (seen - of_seen)

    return sums, jax.tree.map(lost, total, seen, sums)


def first_of_each(index: Integer[Array, "b"]) -> Bool[Array, "b"]:
    """Where a sample is named for the first time: one that is there twice is one entry of the table."""
    return jnp.argmax(index[:, None] == index, axis=1) == jnp.arange(index.size)


def along(factors: Array, leaf: Array) -> Array:
    """Numbers of the leading axes, in a shape that meets the leaf's."""
    return factors.reshape(factors.shape + (1,) * (leaf.ndim - factors.ndim))
