"""Represents gradients of samples as SAGA's table stores them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .linear import LinearLoss, margin


class Gradients(NamedTuple):
    """Holds the functions by which a table stores gradients.

    A table stores gradients as they are or, for a linear model, the slopes by which samples are multiplied.

    Attributes:
        entries: From parameters (d,) and samples (b, ...) to the entries of the table, shape (b, ...).
        total: From entries and their samples to the sum of gradients, (d,).
    """

    entries: Callable[[Array, PyTree[Array]], Array]
    total: Callable[[Array, PyTree[Array]], Float[Array, "d"]]


def gradients_of(
    loss: Callable[[PyTree[Array], Any], Array], w: Float[Array, "d"], unravel: Callable[[Array], PyTree[Array]]
) -> Gradients:
    """Returns the representation of a loss's gradients, for parameters that are one vector such as w.

    Args:
        loss: From parameters and one sample to one number.
        w: Parameters as one vector, for its shape and dtype.
        unravel: From such a vector to parameters.
    """
    if not isinstance(loss, LinearLoss):
        gradient = jax.grad(lambda w, sample: loss(unravel(w), sample))
        return Gradients(jax.vmap(gradient, (None, 0)), lambda entries, samples: jnp.sum(entries, axis=0))

    def margins(w, x):
        return jax.vmap(margin, (None, 0))(unravel(w), x)

    def entries(w, samples):
        x, y = samples
        return jax.vmap(jax.grad(loss.margin_loss))(margins(w, x), y)

    def total(entries, samples):
        _, transpose = jax.vjp(lambda v: margins(v, samples[0]), jnp.zeros_like(w))
        return transpose(entries.astype(w.dtype))[0]

    return Gradients(entries, total)
