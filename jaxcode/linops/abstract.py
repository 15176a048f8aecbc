"""The interface of linear operators, and what all of them share."""

import abc
from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

Rows = Shaped[Array, "rows features"]
Results = Shaped[Array, "results features"]
Mask = Bool[Array | np.ndarray, "_"] | None


class AbstractLinop(abc.ABC):
    """Maps n rows of data to p rows of results, the same way for every feature.

    Attributes:
        present: Which rows have data, bool (n,); the values of the others, NaN included, have no effect. All if None.
        defined: Which results are defined, bool (p,); the others are NaN. All if None.
    """

    present: Mask
    defined: Mask

    @property
    @abc.abstractmethod
    def mixes(self) -> bool:
        """Returns whether results are sums over rows, which need real numbers; False where rows are only moved."""

    @abc.abstractmethod
    def product(self, rows: Rows) -> Results:
        """Computes the results in float64 or float32; undefined results are finite and arbitrary."""

    @abc.abstractmethod
    def unmasked_product(self, rows: Rows) -> tuple[Results, Bool[Array, ""] | bool]:
        """Computes the product without a masked copy of the data; returns it and whether its defined results are right.

        Operators that read the data in blocks mask each block, which copies no more than that.
        """

    @abc.abstractmethod
    def amplification(self) -> Float[Array, ""] | float:
        """Bounds by how much rounding errors of the data may grow."""

    @abc.abstractmethod
    def matrix(self) -> Float[Array, "results rows"]:
        """Forms the matrix, with zeros for absent rows and NaN for results that are not defined.

        Returns:
            Shape (p, n); float64 where JAX's x64 mode is on, else float32.
        """


def apply_in_one_pass(linop: AbstractLinop, rows: Rows) -> Results:
    """Computes the results in the data's dtype by one masked product."""
    return hide_undefined(linop, linop.product(rows).astype(rows.dtype))


def hide_undefined(linop: AbstractLinop, results: Results) -> Results:
    """Replaces the results that are not defined by `undefined_value`."""
    if linop.defined is None:
        return results
    return jnp.where(jnp.asarray(linop.defined)[:, None], results, undefined_value(results.dtype))


def undefined_value(dtype: DTypeLike) -> Array:
    """Returns the value of undefined results: NaN, the lowest signed integer, the highest unsigned one, or False."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(jnp.nan, dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        return jnp.asarray(limits.min or limits.max, dtype)
    return jnp.zeros((), dtype)


def has_numpy_leaves(linop: AbstractLinop) -> bool:
    """Returns whether all arrays of an operator are NumPy's, whose values are known even under trace."""
    return all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(linop))


def allow_transfers() -> AbstractContextManager[None]:
    """Allows implicit transfers of static operators where the caller's transfer guard disallows those of data."""
    return jax.transfer_guard_host_to_device("allow")


def prepare_eagerly(prepare: Callable[[], AbstractLinop]) -> AbstractLinop:
    """Prepares an operator from static values eagerly, even while a program is being traced.

    Args:
        prepare: A function that depends on no tracer.

    Returns:
        An operator without tracers.
    """
    try:
        linop = prepare()
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(linop)):
            return linop
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
        pass
    # The operator was staged out to the program that is being traced. Compile-time evaluation is not tried first,
    # because it compiles even the constants of a compiled function one by one.
    with jax.ensure_compile_time_eval():
        return prepare()
