"""The interface of linear operators."""

import abc
from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Shaped

Rows = Shaped[Array, "rows features"]
Results = Shaped[Array, "results features"]
Mask = Bool[Array | np.ndarray, "_"] | None


class AbstractLinop(abc.ABC):
    """Maps n rows of data to p rows of results, the same way for every feature.

    Attributes:
        present: Which rows have data, bool (n,); what the others hold has no effect, NaN included. All of them if None.
        defined: Which results exist, bool (p,); the others are NaN. All of them if None.
    """

    present: Mask
    defined: Mask

    @property
    @abc.abstractmethod
    def mixes(self) -> bool:
        """Whether a result is a sum over rows, so that data must be real numbers; False where rows are only moved."""

    @abc.abstractmethod
    def product(self, rows: Rows) -> Results:
        """Computes the results in float64 or float32; those that are not defined are finite and mean nothing."""

    @abc.abstractmethod
    def unmasked_product(self, rows: Rows) -> tuple[Results, Bool[Array, ""] | bool]:
        """Computes the product without hiding absent rows, and says whether these left it intact."""

    @abc.abstractmethod
    def amplification(self) -> Float[Array, ""] | float:
        """Bounds by how much rounding errors of the data may grow."""

    @abc.abstractmethod
    def matrix(self) -> Float[Array, "results rows"]:
        """Forms the matrix, with zeros for absent rows and NaN for results that are not defined.

        Returns:
            Shape (p, n); float64 where JAX's x64 mode is on, else float32.
        """


def is_static(linop: AbstractLinop) -> bool:
    """Whether NumPy holds all of an operator, so that it is known to the host whatever is being traced."""
    return all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(linop))


def transfers_allowed() -> AbstractContextManager[None]:
    """Lets static operators be given to programs where the caller guards against transfers of data."""
    return jax.transfer_guard_host_to_device("allow")


def prepare_eagerly(prepare: Callable[[], AbstractLinop]) -> AbstractLinop:
    """Prepares an operator from static values now, although a program may be being traced.

    Args:
        prepare: Depends on nothing that is being traced.

    Returns:
        An operator without tracers.
    """
    try:
        linop = prepare()
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(linop)):
            return linop
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
        pass
    # It became part of the program that is being traced. Compile-time evaluation is not tried first, because inside it
    # even the constants of what is compiled are compiled one by one.
    with jax.ensure_compile_time_eval():
        return prepare()
