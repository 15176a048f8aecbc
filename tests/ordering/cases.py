"""Batches, a model and meshes on which orders and features are tested."""

import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxcode import SplineCode


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model(x):
    return jnp.sin(x @ jnp.asarray(normal(3, 4, seed=5)))


CODE = SplineCode.chebyshev(num_data=5, num_workers=12)
RETURNED = np.arange(12) % 4 != 1
AXIS_TYPES = {
    "automatic": (AxisType.Auto, AxisType.Auto),
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "mixed": (AxisType.Explicit, AxisType.Auto),
}
SPECS = {
    "not sharded": None,
    "rows": PartitionSpec("i"),
    "rows and columns": PartitionSpec("i", "j"),
}
