"""Distributes samples over machines."""

from collections.abc import Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer, PyTree

from .._pytree import pytree
from ..checks import batch_size


@final
@pytree("num_samples", eq=False)
class Shards:
    """Holds the samples of K machines, each machine's padded with its last one to the number of the largest machine.

    Attributes:
        samples: Leaves (K, m, ...).
        sizes: How many samples each machine has, without padding, int32, shape (K,).
        num_samples: n, the samples of all machines.
    """

    samples: PyTree[Array]
    sizes: Integer[Array, "machines"]
    num_samples: int


def shard(data: PyTree[Any], num_machines: int, sizes: Sequence[int] | None) -> Shards:
    """Divides samples, leaves (n, ...), into consecutive parts, one for each machine.

    Raises:
        ValueError: If leading axes differ, or a machine would have no sample, or too many or few.
    """
    count = batch_size("data", data)
    equal_sizes = np.diff(np.arange(num_machines + 1) * count // num_machines).tolist()
    if sizes is None and num_machines > count:
        raise ValueError(f"num_machines is {num_machines} for {count} samples; expected at most as many")
    sizes = list(equal_sizes if sizes is None else sizes)
    if len(sizes) != num_machines or sum(sizes) != count or min(sizes) < 1:
        raise ValueError(
            f"shard_sizes is {sizes} for {num_machines} machines and {count} samples; expected a number of at "
            "least 1 for each machine, together all samples"
        )
    ends = np.cumsum(sizes)
    rows = np.minimum((ends - sizes)[:, None] + np.arange(max(sizes)), ends[:, None] - 1).astype(np.int32)

    def divide(leaf):
        # Transfers are explicit, so that a transfer guard lets them pass.
        return jax.device_put(leaf[rows]) if isinstance(leaf, np.ndarray) else _take(leaf, jax.device_put(rows))

    return Shards(jax.tree.map(divide, data), jax.device_put(np.array(sizes, np.int32)), count)


def sample_mask(num_rows: int, sizes: Integer[Array, "*machines"]) -> Bool[Array, "*machines rows"]:
    """Returns True for a machine's samples, and False for the rows that pad them."""
    rows = jnp.arange(num_rows, dtype=jnp.int32).reshape((1,) * sizes.ndim + (num_rows,))
    return rows < sizes[..., None]


@jax.jit
def _take(leaf, rows):
    return leaf[rows]
