"""Float64 numbers as pairs of float32 numbers, which keep their digits where JAX's x64 mode is off."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from .._float64 import double_precision, x64_is_on


class DoubleSingle(NamedTuple):
    """Holds float64 numbers as a pair that keeps their digits as an argument of jitted functions with x64 off.

    Attributes:
        hi: The numbers; with x64 off JAX holds them in float32.
        lo: Their rounding error, float32; None where `hi` is float64.
    """

    hi: Array | np.ndarray
    lo: Array | np.ndarray | None

    def combine(self) -> Float[Array, "..."]:
        """Adds both parts in float64."""
        with double_precision():
            hi = jnp.asarray(self.hi).astype(jnp.float64)
            return hi if self.lo is None else hi + jnp.asarray(self.lo).astype(jnp.float64)

    def astype(self, dtype: DTypeLike) -> Array:
        """Converts the numbers to a floating dtype: both parts to float64, `hi` alone to a narrower one.

        An operator's entries rounded to the dtype of narrow data add no larger error than rounding the data did.
        """
        return self.combine() if dtype == jnp.float64 else jnp.asarray(self.hi).astype(dtype)


def split(numbers: Array | np.ndarray) -> DoubleSingle:
    """Splits float64 numbers where JAX would round them; NumPy arrays are not split.

    Args:
        numbers: Float64, of any shape.

    Returns:
        The numbers as one float64 array (NumPy, or x64 on), or as two float32 arrays.
    """
    if isinstance(numbers, np.ndarray) or x64_is_on():
        return DoubleSingle(numbers, None)
    with double_precision():
        return _split_compiled(numbers)


def as_arguments(tree: PyTree[Any]) -> PyTree[Any]:
    """Prepares a tree of `DoubleSingle` as an argument of a jitted function: NumPy's float64 numbers are split."""

    def split_node(node):
        is_unsplit = is_double_single(node) and node.lo is None and isinstance(node.hi, np.ndarray)
        return _split(node.hi) if is_unsplit else node

    return tree if x64_is_on() else jax.tree.map(split_node, tree, is_leaf=is_double_single)


def is_double_single(node: Any) -> bool:
    """Returns whether a node is a `DoubleSingle`; the `is_leaf` of functions over trees."""
    return isinstance(node, DoubleSingle)


def _split(numbers):
    hi = numbers.astype(np.float32)
    return DoubleSingle(hi, (numbers - hi.astype(np.float64)).astype(np.float32))


_split_compiled = jax.jit(_split, inline=True)
