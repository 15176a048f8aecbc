"""Computes digests of functions and settings that are the same in every process."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import UInt

_ADDRESS = re.compile(r" at 0x[0-9a-f]+|0x[0-9a-f]{8,}")
# Parameters of primitives that depend on where a function is traced, not on what it computes.
_CONTEXT_PARAMETERS = ("ctx_mesh", "name", "debug_info")


def text_digest(text: str) -> UInt[np.ndarray, "2"]:
    """Computes 64 bits of a text's SHA-256 digest."""
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint32).copy()


def function_digest(function: Callable[..., Any], *arguments: Any) -> UInt[np.ndarray, "2"]:
    """Computes a digest of the program that a function is traced to, constants included.

    Two functions have the same digest if they compute the same by the same primitives, wherever and under whichever
    names they are defined.

    Args:
        function: The function, which is traced.
        *arguments: Trees of `jax.ShapeDtypeStruct`.
    """
    return text_digest("\n".join(_format_program(jax.make_jaxpr(function)(*arguments))))


def _format_program(closed: ClosedJaxpr) -> Iterator[str]:
    """Yields the lines of a program, with variables numbered in the order in which they appear."""
    jaxpr = closed.jaxpr
    numbers: dict[Any, int] = {}

    def format_atom(atom):
        if isinstance(atom, Literal):
            return f"{atom.aval} {_format_value(atom.val)}"
        return f"{atom.aval} {numbers.setdefault(atom, len(numbers))}"

    yield f"constants {[_format_value(constant) for constant in closed.consts]}"
    yield f"inputs {[format_atom(variable) for variable in (*jaxpr.constvars, *jaxpr.invars)]}"
    for equation in jaxpr.eqns:
        parameters = [
            f"{name}={_format_value(equation.params[name])}"
            for name in sorted(equation.params)
            if name not in _CONTEXT_PARAMETERS
        ]
        inputs, outputs = ([format_atom(atom) for atom in atoms] for atoms in (equation.invars, equation.outvars))
        yield f"{outputs} = {equation.primitive.name} {parameters} {inputs}"
    yield f"outputs {[format_atom(atom) for atom in jaxpr.outvars]}"


def _format_value(value: Any) -> str:
    """Formats a constant or a parameter of a primitive."""
    if isinstance(value, Jaxpr):
        value = ClosedJaxpr(value, ())
    if isinstance(value, ClosedJaxpr):
        return "{" + "; ".join(_format_program(value)) + "}"
    if isinstance(value, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        return f"{array.dtype}{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    if isinstance(value, Mapping):
        return str([(str(key), _format_value(value[key])) for key in sorted(value, key=str)])
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return str([_format_value(part) for part in value])
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return _ADDRESS.sub("", repr(value))
