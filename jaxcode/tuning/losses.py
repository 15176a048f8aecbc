"""Defines the losses that tuning lowers, which compare decoded results with the model's own answers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Real

from .. import metrics
from ..surrogates.calibration import DISAGREEMENT, SQUARED_ERROR

__all__ = ["LOSSES", "Loss", "disagreement", "squared_error"]

# From the results of a group and the model's own answers to its inputs, leaves (K, ...), to a number.
Loss = Callable[[PyTree[Array], PyTree[Array]], Float[Array, ""]]


def disagreement(results: Real[Array, "data classes"], targets: Real[Array, "data classes"]) -> Float[Array, ""]:
    """Computes the share of inputs that get another class than the model gives them.

    Args:
        results: Decoded scores of the classes, shape (K, classes); the row of a lost input is NaN and disagrees.
        targets: The model's own, shape (K, classes).

    Returns:
        A number from 0 to 1.

    >>> float(disagreement(jnp.array([[0.1, 0.9], [0.6, 0.4]]), jnp.array([[0.0, 1.0], [0.0, 1.0]])))
    0.5
    """
    # Each input disagrees by exactly 0 or 1. One minus the share that agrees may round to a number below 0.
    return jnp.mean(1 - jax.vmap(metrics.agreement)(results, targets))


def squared_error(results: PyTree[Array], targets: PyTree[Array]) -> Float[Array, ""]:
    """Computes the mean over inputs of the squared error norm, over all leaves.

    Args:
        results: Decoded results, leaves (K, ...).
        targets: The model's own answers, leaves (K, ...).

    Returns:
        A number of at least 0.

    >>> float(squared_error(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 2.0], [3.0, 2.0]])))
    2.0
    """

    def leaf_error(result, target):
        error = _widen(result) - _widen(target)
        return (jnp.sum(error**2) / result.shape[0]).astype(jnp.result_type(float))

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf_error, results, targets)))


LOSSES: dict[str, Loss] = {SQUARED_ERROR: squared_error, DISAGREEMENT: disagreement}


def _widen(leaf):
    """Converts everything but float64 to float32, in which squares neither overflow nor lose their digits."""
    return leaf if leaf.dtype == jnp.float64 else leaf.astype(jnp.float32)
