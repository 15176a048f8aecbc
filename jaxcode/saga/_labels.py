"""Checks the labels of the losses that this package defines."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from ..checks import is_real, static_value

Labels = Shaped[Array | np.ndarray, "n"]


def check_signs(y: Any, margin: jax.ShapeDtypeStruct) -> Labels:
    """Checks labels of two classes, -1 and 1, and converts them to the dtype of margins.

    Raises:
        ValueError: If labels have another shape or dtype or, where they are not traced, other values.
    """
    remedy = "expected -1 and 1, one for each sample: np.where(y > 0, 1, -1)"
    _check_margin(margin, has_classes=False)
    y = _check_vector(y, remedy)
    # In an unsigned dtype -1 is 255 or more.
    if y.dtype == np.bool_ or jnp.issubdtype(y.dtype, jnp.unsignedinteger):
        raise ValueError(f"y has dtype {y.dtype}, which has no -1; {remedy}")
    values = static_value(y)
    if values is not None and not np.all(np.abs(values) == 1):
        raise ValueError(f"y has the values {_format_some(values)}; {remedy}")
    return y.astype(margin.dtype)


def check_classes(y: Any, margin: jax.ShapeDtypeStruct) -> Labels:
    """Checks numbers of classes, 0 to classes - 1, and converts them to int32.

    Raises:
        ValueError: If labels have another shape or dtype or, where they are not traced, other values.
    """
    _check_margin(margin, has_classes=True)
    (classes,) = margin.shape
    remedy = f"expected the class of each sample, an integer from 0 to {classes - 1}"
    y = _check_vector(y, remedy)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"y has dtype {y.dtype}; {remedy}: y.astype(int)")
    values = static_value(y)
    if values is not None and (values.min() < 0 or values.max() >= classes):
        raise ValueError(
            f"y has the values {_format_some(values)}; {remedy}, as params has {classes} classes: start at 0"
        )
    return y.astype(np.int32)


def check_numbers(y: Any, margin: jax.ShapeDtypeStruct) -> Labels:
    """Checks finite real numbers and converts them to the dtype of margins.

    Raises:
        ValueError: If they have another shape or dtype or, where they are not traced, are not finite.
    """
    remedy = "expected a finite real number for each sample"
    _check_margin(margin, has_classes=False)
    y = _check_vector(y, remedy)
    if y.dtype == np.bool_:
        raise ValueError(f"y has dtype bool; {remedy}: y.astype(float)")
    check_finite("y", y)
    return y.astype(margin.dtype)


def check_finite(name: str, value: Any) -> None:
    """Refuses floating-point numbers that are not finite, unless they are traced.

    Raises:
        ValueError: If one is not.
    """
    values = static_value(value) if jnp.issubdtype(value.dtype, jnp.floating) else None
    if values is None or np.isfinite(values).all():
        return
    position = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
    raise ValueError(f"{name}[{', '.join(map(str, position))}] is {values[position]}; expected finite numbers")


def _check_vector(y, remedy):
    y = y if isinstance(y, np.ndarray | jax.Array) else np.asarray(y)
    if not (is_real(y.dtype) or y.dtype == np.bool_):
        raise ValueError(f"y has dtype {y.dtype}; {remedy}")
    if y.ndim != 1:
        hint = ": y.ravel()" if y.ndim == 2 and 1 in y.shape else ""
        raise ValueError(f"y has shape {y.shape}; {remedy}, shape (n,){hint}")
    return y


def _check_margin(margin, *, has_classes):
    if len(margin.shape) == int(has_classes):
        return
    shape, expected = ("(d, classes)", "(d,)") if margin.shape else ("(d,)", "(d, classes)")
    raise ValueError(f"params has a kernel of shape {shape}; expected {expected} for this loss")


def _format_some(values):
    """Formats a few of the distinct values."""
    distinct = np.unique(values)
    shown = ", ".join(str(value) for value in distinct[:5])
    return f"{shown}, ..." if distinct.size > 5 else shown
