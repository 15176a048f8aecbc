"""Refusing arguments that make no sense, where their values are known.

Under `jit` a value may not be known while the program is being traced; shapes and dtypes always are. A check looks at
what is known and says what was given, what was expected and what to do.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def static_value(value: Any) -> np.ndarray | None:
    """Returns a copy of a value that the host knows now, None for all others.

    Args:
        value: A number, a sequence of them, or an array.

    Returns:
        The value in NumPy of numbers, NumPy arrays, and JAX arrays in the host's memory; one that is still being
        computed there is waited for. None for what is being traced, and for arrays on accelerators or other hosts,
        which are never fetched.
    """
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Tracer):
        return None
    if isinstance(value, jax.Array) and not _in_host_memory(value):
        return None
    return np.array(value)


def _in_host_memory(array: jax.Array) -> bool:
    return array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())


def is_static(tree: Any) -> bool:
    """Whether the host knows every leaf of a tree now; see `static_value`."""
    return all(static_value(leaf) is not None for leaf in jax.tree.leaves(tree))


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`, as a Python int."""
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; expected a whole number, at least {least}") from None
    if isinstance(value, bool) or count < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number, at least {least}")
    return count


def check_vector(name: str, value: Any, least: int = 2) -> None:
    """A one-dimensional array of finite real numbers, at least `least` of them."""
    try:
        shape, dtype = np.shape(value), _dtype(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; expected a one-dimensional array of numbers") from None
    if len(shape) != 1 or shape[0] < least:
        raise ValueError(f"{name} has shape {shape}; expected one dimension with at least {least} entries")
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise ValueError(f"{name} has dtype {dtype}; expected real numbers")
    if (static := static_value(value)) is not None and not np.all(np.isfinite(np.float64(static))):
        raise ValueError(f"{name} is {static}; expected finite numbers only")


def check_ascending(name: str, value: Any, *, strictly: bool = False) -> None:
    """Entries in ascending order; `strictly` also refuses equal ones."""
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
    """One real number, zero or more."""
    if np.shape(value) != ():
        raise ValueError(f"{name} has shape {np.shape(value)}; expected a single number, 0 or more")
    if (static := static_value(value)) is not None:
        try:
            number = float(static)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {value!r}; expected a number, 0 or more") from None
        if not 0 <= number < np.inf:
            raise ValueError(f"{name} is {number}; expected a finite number, 0 (interpolate) or more (smooth)")


def check_values(name: str, value: Any, count: int) -> None:
    """An array whose leading axis is the knots."""
    if np.ndim(value) < 1 or np.shape(value)[0] != count:
        raise ValueError(f"{name} has shape {np.shape(value)}; expected its leading axis to be the {count} knots")


def check_weights(name: str, value: Any, count: int) -> None:
    """One finite number, zero or more, per knot."""
    if np.shape(value) != (count,):
        raise ValueError(f"{name} has shape {np.shape(value)}; expected one weight per knot, shape ({count},)")
    if (static := static_value(value)) is not None:
        numbers = np.float64(static)
        if not np.all((numbers >= 0) & (numbers < np.inf)):
            raise ValueError(f"{name} is {numbers}; expected finite weights, 0 (left out) or more")


def check_mask(name: str, value: Any, count: int) -> None:
    """A bool array with one entry per worker (or knot)."""
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
    """The length of the leading axis, at least 1, that all leaves share."""
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


def _dtype(value):
    return value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
