"""Prepares arguments: moves them to the device with explicit transfers, and pads batches."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree


def as_arrays(name: str, tree: PyTree[Any]) -> PyTree[Array]:
    """Makes every leaf a JAX array; those of NumPy and Python's numbers are transferred explicitly.

    Unlike `jnp.asarray` it does so under `jax.transfer_guard("disallow")`, which refuses implicit transfers.

    Args:
        name: Name of the argument, for the error.
        tree: Arrays and numbers.

    Returns:
        The same tree of `jax.Array`, in the dtypes that JAX has for them.

    Raises:
        ValueError: If a leaf holds no numbers.
    """

    def convert(path, leaf):
        if isinstance(leaf, jax.Array):
            return leaf
        try:
            return jax.device_put(np.asarray(leaf))
        except (TypeError, ValueError):
            leaf_name = name + jax.tree_util.keystr(path)
            raise ValueError(f"{leaf_name} is {leaf!r}; expected numbers: give arrays") from None

    return jax.tree_util.tree_map_with_path(convert, tree)


def concatenate_rows(tree: PyTree[Array]) -> Array:
    """Concatenates all numbers of each row, leaves (B, ...) to (B, numbers); in float32, or in wider leaves' dtype."""
    leaves = [jnp.reshape(leaf, (leaf.shape[0], -1)) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate([leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves], axis=1)


def as_float(value: ArrayLike | Sequence[float]) -> Array:
    """Converts real numbers to JAX's default floating dtype, with an explicit transfer."""
    return value.astype(float) if isinstance(value, jax.Array) else jax.device_put(np.asarray(value, np.float64))


def as_int(value: ArrayLike) -> Array:
    """Converts an integer to JAX's default integer dtype, with an explicit transfer."""
    return value.astype(int) if isinstance(value, jax.Array) else jax.device_put(np.asarray(value, np.int64))


def pad(leaf: Array | np.ndarray, size: int) -> Array | np.ndarray:
    """Pads a batch to a size with copies of its last input; a NumPy array stays one."""
    num_copies = size - leaf.shape[0]
    xp = np if isinstance(leaf, np.ndarray) else jnp
    return xp.concatenate([leaf, xp.repeat(leaf[-1:], num_copies, axis=0)]) if num_copies else leaf
