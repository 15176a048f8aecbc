"""Output spaces, in which a model's answers are decoded: as returned, as logits, or as probabilities.

A decoder fits a curve to the answers, and a classifier's logits usually bend less along that curve than the
probabilities computed from them. Results are transformed back to the space in which the model answers.
"""

import functools
from collections.abc import Callable
from typing import final

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from ._arrays import as_arrays
from ._pytree import pytree

__all__ = ["OutputSpace", "as_returned", "logits", "probabilities"]


@final
@pytree("name", "transform", "inverse_transform")
class OutputSpace:
    """Transforms answers before they are decoded, and results back.

    Attributes:
        name: Its name in reports.
        transform: From the answers as the model returns them, leaves (B, ...), to the space in which they are decoded.
        inverse_transform: The inverse, from decoded answers, leaves (B, ...), to results.
    """

    name: str
    transform: Callable[[PyTree[ArrayLike]], PyTree[ArrayLike]]
    inverse_transform: Callable[[PyTree[ArrayLike]], PyTree[ArrayLike]]


def _identity(tree: PyTree[ArrayLike]) -> PyTree[ArrayLike]:
    return tree


def _softmax(tree: PyTree[ArrayLike]) -> PyTree[Array]:
    return _softmax_leaves(_as_class_scores("outputs", tree))


def _log_answers(tree: PyTree[ArrayLike]) -> PyTree[Array]:
    return _log_leaves(_as_class_scores("answers", tree), "tiny")


def _log_results(tree: PyTree[ArrayLike]) -> PyTree[Array]:
    # Decoded probabilities may be 0 or negative, and their last digits are noise.
    return _log_leaves(_as_class_scores("results", tree), "eps")


def _as_class_scores(name, tree):
    """Converts leaves to floating-point arrays with at least one axis."""
    tree = as_arrays(name, tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.ndim < 1 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{name + jax.tree_util.keystr(path)} has shape {leaf.shape} and dtype {leaf.dtype}; expected "
                "floating-point numbers with the classes as last axis: use outputs.as_returned for all else"
            )
    return tree


@jax.jit
def _softmax_leaves(tree):
    return jax.tree.map(lambda leaf: jax.nn.softmax(leaf, axis=-1), tree)


@functools.partial(jax.jit, static_argnums=1)
def _log_leaves(tree, minimum):
    """Computes logarithms, of `tiny` or `eps` of a leaf's dtype where its numbers are smaller."""

    def log(leaf):
        return jnp.log(jnp.maximum(leaf, jnp.asarray(getattr(jnp.finfo(leaf.dtype), minimum), leaf.dtype)))

    return jax.tree.map(log, tree)


as_returned = OutputSpace("as returned", _identity, _identity)
probabilities = OutputSpace("probabilities", _softmax, _log_results)
logits = OutputSpace("logits", _log_answers, _softmax)
