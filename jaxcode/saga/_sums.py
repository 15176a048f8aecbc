"""Sums that many small numbers are added to, with what rounding leaves out."""

import jax
from jaxtyping import Array, PyTree


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
