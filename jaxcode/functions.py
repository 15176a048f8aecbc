"""Makes pure functions of parameters and a batch from callables, nnx modules and linen modules."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jaxtyping import PyTree

from ._side_input import without_marks

__all__ = [
    "NO_DERIVATIVES",
    "Model",
    "Params",
    "PureFunction",
    "as_pure_function",
    "call",
    "check_answers",
]

Params = PyTree
PureFunction = Callable[[Params, PyTree], PyTree]
# A callable of a batch, an nnx module or its graph and state, or a linen module with its variables.
Model = Callable | nnx.Module | tuple[nnx.GraphDef, Any] | tuple[linen.Module, Mapping[str, Any]]

# The exceptions that JAX raises for the derivative of a model of integers, or of one that calls the host.
NO_DERIVATIVES = (TypeError, ValueError, NotImplementedError)

_MAX_TEXT = 200
# Constants that a compiled program holds a copy of: four megabytes of float32.
_MANY_NUMBERS = 2**20


def as_pure_function(f: Model) -> tuple[PureFunction, Params]:
    """Separates the function that a model computes from its parameters, in evaluation mode.

    Dropout is off and batch normalisation uses its running averages. An nnx module is copied and the copy is put in
    evaluation mode (`module.eval()`); the given one is not changed. No collection of a linen module is mutable; where
    its fields ask for training behaviour (`deterministic=False`, `use_running_average=False`), set them in the module.

    Parts of the batch that are marked as `jaxcode.SideInput` reach the model without the mark.

    A `functools.partial` of any of these passes further arguments. Arrays among them, wherever they are in pytrees, are
    parameters; everything else, such as `train=False`, is part of the function.

    Args:
        f: A callable of a batch; an `nnx.Module`, called with a batch; a method of one; its (graphdef, state); or a
            pair (linen module, its variables). The leading axis of its input and of its output is the batch. A call
            must not change an nnx module's state, such as a cache or a counter.

    Returns:
        A pure function `fn(params, batch)` and params, a pytree. The function can be sent to other processes. It is
            hashable, and equal to the function of every model with the same structure (the same nnx graph, an equal
            linen module, the same callable), whatever the parameters: as a static argument of `jax.jit` it is traced
            once for all of them. Where a model's structure is not hashable, functions are equal if they were made from
            the same linen module or callable. The params of a callable are `()`: the arrays that it closes over are
            constants of the trace, as under `jax.jit`. If they are an nnx module, or more than a million numbers, a
            `UserWarning` tells of it.

    Raises:
        ValueError: If f is none of these, or is a class, a linen module without variables or a `TrainState`.

    >>> fn, params = as_pure_function(lambda x: 2 * x)
    >>> fn(params, 3)
    6
    """
    if isinstance(f, functools.partial):
        fn, params = as_pure_function(f.func)
        leaves, structure = jax.tree.flatten((f.args, f.keywords))
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]
        constants = tuple(None if isinstance(leaf, jax.Array | np.ndarray) else leaf for leaf in leaves)
        return _PartialApply(fn, structure, _Static(constants)), (params, arrays)
    if isinstance(f, tuple) and len(f) == 2 and isinstance(f[0], nnx.GraphDef):
        f = nnx.merge(*f)  # pyright: ignore[reportCallIssue, reportArgumentType]
    module, method = f, "__call__"
    if inspect.ismethod(f) and isinstance(f.__self__, nnx.Module):
        module, method = f.__self__, f.__name__
    if isinstance(module, nnx.Module):
        module = nnx.clone(module)
        module.eval()
        graphdef, state = nnx.split(module)
        return _NnxApply(_Static(graphdef), method), state
    if isinstance(f, tuple) and len(f) == 2 and isinstance(f[0], linen.Module):
        module, variables = f
        if not isinstance(variables, Mapping):
            raise ValueError(
                f"f is (linen module, {type(variables).__name__}); expected the variables that module.init returned, "
                "a mapping such as {'params': ...}"
            )
        return _LinenApply(_Static(module)), variables
    if isinstance(f, linen.Module):
        raise ValueError(
            f"f is a linen {type(f).__name__} without variables; expected the pair (module, variables), "
            "with variables = module.init(key, x) or a checkpoint"
        )
    if hasattr(f, "apply_fn") and hasattr(f, "params"):
        raise ValueError(
            f"f is a {type(f).__name__}; expected its module and variables: (module, {{'params': state.params}}), with "
            "batch statistics beside the parameters if there are any"
        )
    if isinstance(f, type) or not callable(f):
        raise ValueError(
            f"f is {_shorten(f)}; expected a callable, an nnx module (an object, not its class), its (graphdef, state) "
            "or (linen module, variables)"
        )
    _warn_of_constants(f)
    return _PlainApply(_Static(f)), ()


def call(params: Params, batch: PyTree[Any]) -> PyTree[Any]:
    """Computes params(batch): the pure function of a pytree that is a function itself, such as a surrogate."""
    return params(batch)


def check_answers(answers: PyTree[Any], size: int, allow_integers: bool = False) -> None:
    """Checks that a model's answers have real entries and the batch as their leading axis.

    Args:
        answers: What the model returned, or its shapes and dtypes, leaves (B, ...).
        size: B, how many inputs the model was given.
        allow_integers: Whether integer and bool leaves pass: a code that mixes no answers returns them as they are.

    Raises:
        ValueError: If there are no leaves, a leaf is no array with B rows, or its dtype cannot be decoded.

    >>> check_answers({"logits": jnp.ones((3, 10))}, size=3)
    """
    leaves = jax.tree_util.tree_leaves_with_path(answers)
    if not leaves:
        raise ValueError(f"f's result is {answers!r}; expected at least one array: have f return its answers")
    for path, leaf in leaves:
        name = "f's result" + jax.tree_util.keystr(path)
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{name} is {leaf!r}; expected an array with the batch of {size} as its leading axis: return one row "
                "for each input"
            )
        if len(leaf.shape) < 1 or leaf.shape[0] != size:
            raise ValueError(
                f"{name} has shape {leaf.shape} for a batch of {size}; expected the batch as its leading axis: return "
                "one row for each input"
            )
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        if not (jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == np.bool_):
            raise ValueError(
                f"{name} has dtype {leaf.dtype}; expected real numbers: return real and imaginary parts, "
                "or other features, as floating-point arrays"
            )
        if not allow_integers:
            raise ValueError(
                f"{name} has dtype {leaf.dtype}; expected floating-point numbers, which a code can mix: return "
                "logits, not classes"
            )


@final
class _Static:
    """Holds an object that is compared by value if it is hashable and by identity if it is not.

    The hash is computed once: the graph of a large nnx module takes a millisecond, and `jax.jit` asks for the hash of
    a static argument at each call.
    """

    def __init__(self, value: Any):
        self.value = value

    @functools.cached_property
    def _key(self) -> tuple[bool, int]:
        """Returns whether the value is hashable, and its hash or its id."""
        try:
            return True, hash(self.value)
        except TypeError:
            return False, id(self.value)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static):
            return NotImplemented
        if self is other or self.value is other.value:
            return True
        return self._key == other._key and self._key[0] and bool(self.value == other.value)

    def __repr__(self) -> str:
        return repr(self.value)

    def __reduce__(self):
        # Neither the hash of a string nor an id is the same in another process.
        return _Static, (self.value,)


@final
@dataclasses.dataclass(frozen=True)
class _NnxApply:
    """Runs a method of the nnx module of a graph, with the state as parameters."""

    graphdef: _Static
    method: str = "__call__"

    def __call__(self, state: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        module = nnx.merge(self.graphdef.value, state)
        before = jax.tree_util.tree_leaves_with_path(nnx.state(module))
        answers = getattr(module, self.method)(*without_marks(args), **kwargs)
        after = dict(jax.tree_util.tree_leaves_with_path(nnx.state(module)))
        changed = [path for path, leaf in before if after.pop(path, None) is not leaf] + list(after)
        if changed:
            raise ValueError(
                f"f changed its state {jax.tree_util.keystr(changed[0])} in a call; expected a module whose state, a "
                "cache or a counter for instance, stays as it is: what workers change would be lost"
            )
        return answers


@final
@dataclasses.dataclass(frozen=True)
class _LinenApply:
    """Runs a linen module, with its variables as parameters."""

    module: _Static

    def __call__(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> PyTree:
        return self.module.value.apply(variables, *without_marks(args), **kwargs)


@final
@dataclasses.dataclass(frozen=True)
class _PlainApply:
    """Runs a callable that has no parameters."""

    f: _Static

    def __call__(self, params: tuple[()], *args: Any, **kwargs: Any) -> PyTree:
        return self.f.value(*without_marks(args), **kwargs)


@final
@dataclasses.dataclass(frozen=True)
class _PartialApply:
    """Runs a pure function with further arguments, whose arrays are parameters: None among the constants."""

    fn: PureFunction
    structure: Any
    constants: _Static

    def __call__(self, params: tuple[Params, list[Any]], *args: Any, **kwargs: Any) -> PyTree:
        inner, arrays = params
        remaining = iter(arrays)
        leaves = [next(remaining) if leaf is None else leaf for leaf in self.constants.value]
        first, keywords = jax.tree.unflatten(self.structure, leaves)
        return self.fn(inner, *first, *args, **{**keywords, **kwargs})


def _shorten(value: Any) -> str:
    """Returns the start of what describes an object, which may be a tree of millions of numbers."""
    text = repr(value)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}... (a {type(value).__name__})"


def _warn_of_constants(f: Callable) -> None:
    """Warns of large numbers that a function closes over."""
    try:
        variables = inspect.getclosurevars(f)
    except (TypeError, ValueError):
        return
    for name, value in {**variables.globals, **variables.nonlocals}.items():
        if isinstance(value, nnx.Module):
            numbers = sum(np.size(leaf) for leaf in jax.tree.leaves(nnx.state(value)))
            remedy = f"pass {name} itself, one of its methods, or functools.partial({name}, ...)"
        elif isinstance(value, jax.Array | np.ndarray) and value.size > _MANY_NUMBERS:
            numbers, remedy = value.size, f"pass functools.partial(f, ...) with {name} as an argument"
        else:
            continue
        warnings.warn(
            f"f closes over {name}, whose {numbers:,} numbers become constants of every program that is compiled; "
            f"expected parameters, which are arguments: {remedy}",
            stacklevel=4,
        )
