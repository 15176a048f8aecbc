"""Gradients of samples as SAGA's table holds them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .linear import LinearLoss, margin


class Gradients(NamedTuple):
    """How gradients are remembered: as they are, or for a linear model as the slopes that samples are multiplied by.

    Attributes:
        entries: Of samples (b, ...) at parameters (d,), what the table holds, shape (b, ...).
        total: The sum of gradients, (d,), of entries and their samples.
    """

    entries: Callable[[Array, PyTree[Array]], Array]
    total: Callable[[Array, PyTree[Array]], Float[Array, "d"]]


def gradients_of(
    loss: Callable[[PyTree[Array], Any], Array], w: Float[Array, "d"], unravel: Callable[[Array], PyTree[Array]]
) -> Gradients:
    """For parameters that are one vector, like w, which unravel makes parameters of."""
    if not isinstance(loss, LinearLoss):
        gradient = jax.grad(lambda w, sample: loss(unravel(w), sample))
        return Gradients(jax.vmap(gradient, (None, 0)), lambda entries, samples: jnp.sum(entries, axis=0))

    def margins(w, x):
        return jax.vmap(margin, (None, 0))(unravel(w), x)

    def entries(w, samples):
        x, y = samples
        return jax.vmap(jax.grad(loss.of_margin))(margins(w, x), y)

    def total(entries, samples):
        _, pull = jax.vjp(lambda v: margins(v, samples[0]), jnp.zeros_like(w))
        return pull(entries.astype(w.dtype))[0]

    return Gradients(entries, total)
