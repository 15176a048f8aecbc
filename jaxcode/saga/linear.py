"""Defines losses of linear models, whose gradients are one number (or one per class) for each sample."""

from collections.abc import Callable, Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, Shaped

from .._pytree import pytree
from . import _labels
from .sparse import SparseRows


@final
@pytree("margin_loss", "curvature", "check_labels")
class LinearLoss:
    r"""Computes a linear model's loss from parameters and one sample.

    .. math:: \phi_i(w) = \ell(x_i \cdot w, y_i)

    The gradient is x_i times the derivative of :math:`\ell` with respect to the margin :math:`x_i \cdot w`, so that
    SAGA's table holds one number for each sample, or one for each class. Parameters are an array, (d,) or (d, classes),
    or a mapping of such a "kernel" and a "bias", as Flax has them; a sample is a pair of x, an array (d,) or a row of
    `SparseRows`, and y.

    Attributes:
        margin_loss: :math:`\ell`, from a margin, shape () or (classes,), and y to the loss.
        curvature: The largest second derivative of :math:`\ell`, from which step sizes follow; None if unknown.
        check_labels: From the labels of all samples, and the shape and dtype of a margin, to the labels that
            margin_loss takes; raises `ValueError` where they make no sense. None to take labels as they are.

    >>> loss = LinearLoss(lambda margin, y: optax.huber_loss(margin, y), curvature=1.0)
    >>> loss(jnp.array([1.0, 2.0]), (jnp.array([1.0, 1.0]), 2.5))
    Array(0.125, dtype=float32)
    """

    margin_loss: Callable[[Array, Array], Array]
    curvature: float | None = None
    check_labels: Callable[[Any, jax.ShapeDtypeStruct], Any] | None = None

    def __call__(self, params: PyTree[Array], sample: tuple[Any, Any]) -> Float[Array, ""]:
        x, y = sample
        return self.margin_loss(margin(params, x), y)


@jax.custom_jvp
def _softplus(x):
    return jax.nn.softplus(x)


# The slope alone needs no logarithm.
_softplus.defjvps(lambda tangent, _, x: tangent * jax.nn.sigmoid(x))


def _logistic(margin, y):
    # A function of the module is pickled by name; a lambda would be pickled with the derivative above, which cannot be.
    return _softplus(-y * margin)


def _squared(margin, y):
    return 0.5 * jnp.square(margin - y)


logistic = LinearLoss(_logistic, curvature=0.25, check_labels=_labels.check_signs)
"""The logistic loss of two classes, y = -1 or 1."""

multinomial = LinearLoss(
    optax.losses.softmax_cross_entropy_with_integer_labels, curvature=0.5, check_labels=_labels.check_classes
)
"""The cross-entropy of classes that are numbered from 0."""

squared = LinearLoss(_squared, curvature=1.0, check_labels=_labels.check_numbers)
"""Half the square of the distance from y, a finite real number."""


def margin(params: PyTree[Array], x: Shaped[Array, "d"] | SparseRows) -> Array:
    """Multiplies one sample by the parameters, shape () or (classes,)."""
    kernel, bias = kernel_and_bias(params)
    product = jnp.tensordot(x.values, kernel[x.indices], 1) if isinstance(x, SparseRows) else x @ kernel
    return product if bias is None else product + bias


def kernel_and_bias(params: PyTree[Any]) -> tuple[Any, Any]:
    """Returns a linear model's kernel and its bias, None if it has none."""
    return (params["kernel"], params["bias"]) if isinstance(params, Mapping) else (params, None)
