"""In which space a model's answers are decoded: as the model returns them, as logits, or as probabilities.

The decoder's curve goes through numbers, and which numbers those are is a choice: of a classifier, logits usually bend
less along the curve than the probabilities that they become. Results come back as the model would return them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._pytree import pytree


@pytree("name", "of_answers", "to_results")
class OutputSpace:
    """Where the decoder's curve is drawn.

    Attributes:
        name: What it is called in reports.
        of_answers: From what the model returns, leaves (B, ...), to what is decoded.
        to_results: Back again.
    """

    name: str
    of_answers: Callable[[PyTree[Array]], PyTree[Array]]
    to_results: Callable[[PyTree[Array]], PyTree[Array]]


def _softmax(tree: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda leaf: jax.nn.softmax(leaf, axis=-1), tree)


def _log(tree: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda leaf: _log_above(jnp.finfo(leaf.dtype).tiny, leaf), tree)


def _log_of_decoded(tree: PyTree[Array]) -> PyTree[Array]:
    # Decoded probabilities come out as zero or less, too; their last digits mean nothing.
    return jax.tree.map(lambda leaf: _log_above(jnp.finfo(leaf.dtype).eps, leaf), tree)


def _log_above(least, leaf: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.log(jnp.maximum(leaf, jnp.asarray(least, leaf.dtype)))


as_returned = OutputSpace("as returned", lambda y: y, lambda y: y)
probabilities = OutputSpace("probabilities", _softmax, _log_of_decoded)
logits = OutputSpace("logits", _log, _softmax)
