"""Samples spread over machines."""

from collections.abc import Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, PyTree

from .._pytree import pytree
from ..checks import batch_size


@final
@pytree("num_samples", eq=False)
class Shards:
    """Samples of K machines, each filled up with its last sample to as many as the largest machine has.

    Attributes:
        samples: Leaves (K, m, ...).
        sizes: How many are each machine's own, shape (K,).
        num_samples: n, those of all machines.
    """

    samples: PyTree[Array]
    sizes: Integer[Array, "machines"]
    num_samples: int


def shard(data: PyTree[Any], num_machines: int, sizes: Sequence[int] | None) -> Shards:
    """Cuts samples, leaves (n, ...), into consecutive runs, one a machine.

    Raises:
        ValueError: If leading axes differ or a machine would have no sample, or too many or few.
    """
    count = batch_size("data", data)
    alike = np.diff(np.arange(num_machines + 1) * count // num_machines).tolist()
    if sizes is None and num_machines > count:
        raise ValueError(f"num_machines is {num_machines} for {count} samples; expected at most as many")
    sizes = list(alike if sizes is None else sizes)
    if len(sizes) != num_machines or sum(sizes) != count or min(sizes) < 1:
        raise ValueError(
            f"shard_sizes is {sizes} for {num_machines} machines and {count} samples; expected a number of at "
            "least 1 for each machine, together all samples"
        )
    ends = np.cumsum(sizes)
    rows = np.minimum((ends - sizes)[:, None] + np.arange(max(sizes)), ends[:, None] - 1)
    return Shards(jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], data), jnp.asarray(sizes), count)
