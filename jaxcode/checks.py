"""Checks arguments: their shapes and dtypes always, their values where they are static.

Every `check_` function takes the name and the value of an argument. It raises a `ValueError` that names the argument,
its value, what was expected and the remedy.
"""

import operator
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike


def static_value(x: Any) -> np.ndarray | None:
    """Copies the value of an array to NumPy if it is static, which is to say known to the host.

    It is copied so that later writes to the array by the caller have no effect.

    Args:
        x: An array, a number or a sequence of them.

    Returns:
        The value, if x is NumPy's, a Python number or a `jax.Array` on CPU devices of this process. None for a tracer,
            for an array on an accelerator, which is never fetched, and for what holds no numbers, such as strings.

    >>> static_value([1, 2])
    array([1, 2])
    >>> jax.jit(lambda x: static_value(x) is None)(1.0).item()
    True
    """
    if isinstance(x, np.ndarray):
        return x.copy() if _holds_numbers(x) else None
    if not all(_in_host_memory(leaf) for leaf in jax.tree.leaves(x)):
        return None
    value = np.array(x)
    return value if _holds_numbers(value) else None


def _holds_numbers(array):
    # "V" is the kind of bfloat16 and other dtypes that JAX adds to NumPy's.
    return array.dtype.kind in "biufcV"


def _in_host_memory(leaf):
    if not isinstance(leaf, jax.Array):
        return True
    if isinstance(leaf, Tracer) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return False
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


def is_static(tree: Any) -> bool:
    """Returns whether every leaf of a tree is static; see `static_value`."""
    return all(static_value(leaf) is not None for leaf in jax.tree.leaves(tree))


def is_real(dtype: DTypeLike) -> bool:
    """Returns whether a dtype is that of real numbers: integer or floating, bfloat16 among them; bool is not."""
    # NumPy's issubdtype does not count bfloat16 as floating.
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Converts a whole number of at least `least` to a Python int.

    Raises:
        ValueError: If it is traced, not whole or below `least`.
    """
    if isinstance(value, Tracer):
        raise ValueError(
            f"{name} is the tracer {value}; expected a whole number known to the host, since it fixes a shape: close "
            "over it or make it a static argument"
        )
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; expected a whole number, at least {least}") from None
    if isinstance(value, bool) or count < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number, at least {least}")
    return count


def check_scalar(
    name: str, value: Any, valid: Callable[[np.ndarray], Any], expected: str, *, integer: bool = False
) -> None:
    """Checks that a value, which may be traced, is one real number, and a valid one where it is static.

    Args:
        name: Name of the argument.
        value: Any object.
        valid: Returns whether the number, a NumPy array of shape (), is in range.
        expected: What the error says was expected: "a number in [0, 1]: give ...".
        integer: Whether only integer dtypes pass.

    Raises:
        ValueError: If the value is not such a number.
    """
    try:
        shape, dtype = np.shape(value), _dtype(value)
    except (TypeError, ValueError):
        shape, dtype = None, np.dtype(object)
    if shape == () and (jnp.issubdtype(dtype, jnp.integer) if integer else is_real(dtype)):
        number = static_value(value)
        if number is None or valid(number):
            return
    raise ValueError(f"{name} is {value!r}; expected {expected}")


def check_positive(name: str, value: Any, remedy: str) -> None:
    """Checks that a value is a finite number above 0."""
    check_scalar(name, value, lambda number: 0 < number < np.inf, f"a number in (0, inf): {remedy}")


def check_not_negative(name: str, value: Any, remedy: str) -> None:
    """Checks that a value is a finite number, 0 or more."""
    check_scalar(name, value, lambda number: 0 <= number < np.inf, f"a number in [0, inf): {remedy}")


def check_at_most(name: str, value: Any, most: int, most_name: str) -> None:
    """Checks that an integer is at most another argument."""
    expected = f"an integer of at most {most_name}={most}: give {most} or fewer, or raise {most_name}"
    check_scalar(name, value, lambda number: number <= most, expected, integer=True)


def check_durations(name: str, value: Any) -> None:
    """Checks that an array holds at least one duration in seconds: not negative, no NaN, inf allowed."""
    if np.ndim(value) != 1 or np.size(value) == 0:
        raise ValueError(
            f"{name} has shape {np.shape(value)}; expected shape (n,) with n >= 1: give one latency in seconds for "
            "each call measured"
        )
    if not is_real(_dtype(value)):
        raise ValueError(f"{name} has dtype {_dtype(value)}; expected real numbers, in seconds")
    numbers = static_value(value)
    if numbers is None:
        return
    violations = np.flatnonzero(~(numbers >= 0))
    if violations.size:
        raise ValueError(
            f"{name}[{violations[0]}] is {numbers[violations[0]]}; expected seconds, 0 or more and not NaN: leave "
            "failed measurements out, or give inf for a call that was never answered"
        )


def check_vector(name: str, value: Any, least: int = 2) -> None:
    """Checks that an array is one-dimensional, with at least `least` finite real numbers."""
    try:
        shape, dtype = np.shape(value), _dtype(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; expected a one-dimensional array of numbers") from None
    if len(shape) != 1 or shape[0] < least:
        raise ValueError(f"{name} has shape {shape}; expected one dimension with at least {least} entries")
    if not is_real(dtype):
        raise ValueError(f"{name} has dtype {dtype}; expected real numbers")
    if (static := static_value(value)) is not None and not np.all(np.isfinite(np.float64(static))):
        raise ValueError(f"{name} is {static}; expected finite numbers only")


def check_ascending(name: str, value: Any, *, strictly: bool = False) -> None:
    """Checks that entries are in ascending order; `strictly` also refuses equal ones."""
    static = static_value(value)
    if static is None:
        return
    steps = np.diff(np.float64(static))
    violations = np.flatnonzero(steps <= 0 if strictly else steps < 0)
    if violations.size:
        first = int(violations[0])
        pair = tuple(float(v) for v in static[first : first + 2])
        kind = "strictly ascending order (no two equal)" if strictly else "ascending order"
        raise ValueError(f"{name}[{first}:{first + 2}] is {pair}; expected {kind}: sort the nodes first")


def check_smoothing(name: str, value: Any) -> None:
    """Checks that a smoothing parameter is one real number, 0 or more."""
    if np.shape(value) != ():
        raise ValueError(f"{name} has shape {np.shape(value)}; expected a single number, 0 or more")
    check_not_negative(name, value, "give a finite number, 0 to interpolate or more to smooth")


def check_values(name: str, value: Any, count: int) -> None:
    """Checks that an array has one row for each of `count` knots."""
    if np.ndim(value) < 1 or np.shape(value)[0] != count:
        raise ValueError(f"{name} has shape {np.shape(value)}; expected its leading axis to be the {count} knots")


def check_weights(name: str, value: Any, count: int) -> None:
    """Checks that weights are finite numbers, 0 or more, one for each knot."""
    if np.shape(value) != (count,):
        raise ValueError(f"{name} has shape {np.shape(value)}; expected one weight per knot, shape ({count},)")
    dtype = _dtype(value)
    if not (is_real(dtype) or dtype == np.bool_):
        raise ValueError(f"{name} has dtype {dtype}; expected real numbers")
    if (static := static_value(value)) is not None:
        numbers = np.float64(static)
        if not np.all((numbers >= 0) & (numbers < np.inf)):
            raise ValueError(f"{name} is {numbers}; expected finite weights, 0 (left out) or more")


def check_mask(name: str, value: Any, count: int) -> None:
    """Checks that a mask is a bool array with one entry for each worker (or knot)."""
    if isinstance(value, np.ndarray) and value.shape == (count,) and value.dtype == np.bool_:
        return
    try:
        shape, dtype = np.shape(value), _dtype(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}; expected bool, one entry for each of the {count}") from None
    if shape != (count,):
        raise ValueError(f"{name} has shape {shape}; expected one entry for each of the {count}, shape ({count},)")
    if dtype != np.bool_:
        raise ValueError(
            f"{name} has dtype {dtype}; expected bool, True where the answer came (for a list of indices: "
            f"mask = np.isin(np.arange({count}), indices))"
        )


def batch_size(name: str, tree: Any) -> int:
    """Returns the length of the leading axis that all leaves share.

    Raises:
        ValueError: If there are no leaves, or their leading axes differ or are 0.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError(f"{name} is {tree!r}; expected at least one array with a leading axis, the batch")
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in leaves}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"{name} has leaves of shapes {[np.shape(leaf) for leaf in leaves]}; expected one leading axis, the batch, "
            "of the same length in all and at least 1"
        )
    return sizes.pop()


def finite_inputs(x: Any, size: int) -> np.ndarray:
    """Returns which inputs of a batch have finite numbers only, bool (size,); only NumPy leaves are read."""
    finite = np.ones(size, bool)
    for leaf in jax.tree.leaves(x):
        if isinstance(leaf, np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            # A sum is several times faster than looking at every number, and finite for nearly all batches.
            with np.errstate(over="ignore", invalid="ignore"):
                is_sum_finite = np.isfinite(leaf.sum())
            if not is_sum_finite:
                finite &= np.isfinite(leaf).reshape(size, -1).all(axis=1)
    return finite


def warn_not_finite(name: str, x: Any, mixes: Callable[[], bool], *, stacklevel: int) -> None:
    """Warns of inputs with a NaN or an infinite number, which spoil those they are mixed with; reads NumPy leaves only.

    Args:
        name: Name of the batch.
        x: The batch, leaves (B, ...).
        mixes: Whether the code mixes inputs; called only if there are such inputs.
        stacklevel: As for `warnings.warn`, called from here.
    """
    leaves = jax.tree.leaves(x)
    if not any(isinstance(leaf, np.ndarray) for leaf in leaves):
        return
    leading_axes = {np.shape(leaf)[:1] for leaf in leaves}
    if len(leading_axes) != 1 or () in leading_axes:
        return  # is an error where the batch is used
    finite = finite_inputs(x, *leading_axes.pop())
    if not finite.all() and mixes():
        warnings.warn(
            f"{name} has a NaN or an infinite number in inputs {list_indices(~finite)} of {len(finite)}: the results "
            "of all inputs that are encoded together with one of these are NaN; remove them first, or use "
            "jaxcode.CodedServer, which leaves them out",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def list_indices(mask: np.ndarray) -> str:
    """Lists the indices at which a mask is True, at most twenty of them.

    >>> list_indices(np.array([False, True, True]))
    '1, 2'
    """
    indices = np.flatnonzero(mask)
    return ", ".join(map(str, indices[:20])) + (", ..." if len(indices) > 20 else "")


def _dtype(value):
    return value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
