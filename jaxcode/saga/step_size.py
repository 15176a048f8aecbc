"""Derives step sizes from the data of linear models."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from .linear import LinearLoss
from .shards import Shards
from .sparse import SparseRows


def lipschitz_step_size(loss: Any, ridge: Any, params: PyTree[Array], shards: Shards) -> Float[Array, ""]:
    """Returns 1 / (3 L), L = max L_i + ridge.

    Raises:
        ValueError: If loss is no `LinearLoss` of known curvature.
    """
    return saga_step_size(jnp.max(smoothness(loss, params, shards.samples[0])) + ridge)


def saga_step_size(smoothness_bound: Float[Array, ""]) -> Float[Array, ""]:
    """Returns 1 / (3 L), or 1 where L is zero, where gradients do not change and any step size will do."""
    return 1 / (3 * jnp.where(smoothness_bound > 0, smoothness_bound, 1 / 3))


def smoothness(loss: Any, params: PyTree[Array], x: Shaped[Array, "*rows d"] | SparseRows) -> Float[Array, "*rows"]:
    r"""Bounds the second derivatives of samples' losses.

    .. math:: L_i = \max \ell'' \, (\|x_i\|^2 + 1[bias])

    Raises:
        ValueError: If loss is no `LinearLoss` of known curvature.
    """
    curvature = loss.curvature if isinstance(loss, LinearLoss) else None
    if curvature is None:
        raise ValueError("step_size is None; expected a number, as it does not follow from this loss: try 1 / (3 L)")
    values = x.values if isinstance(x, SparseRows) else x
    return curvature * (jnp.sum(jnp.square(values), axis=-1) + (1.0 if isinstance(params, Mapping) else 0.0))
