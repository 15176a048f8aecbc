"""What workers compute: a callable, an nnx module or a linen module with its variables, as one pure function."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jaxtyping import PyTree

Params = PyTree
PureFunction = Callable[[Params, PyTree], PyTree]

# What is raised where derivatives are asked of a model of whole numbers, or of one that calls the host.
NO_DERIVATIVES = (TypeError, ValueError, NotImplementedError)


def as_pure_function(f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]]) -> tuple[PureFunction, Params]:
    """Separates what a model computes from its parameters, in evaluation mode.

    Dropout is off and batch normalisation uses its running averages: an nnx module is copied and the copy put in
    evaluation mode (`module.eval()`), the one given stays as it is; of a linen module no collection is mutable, and
    where its own settings ask for training behaviour (`deterministic=False`, `use_running_average=False`) they must
    be set in the module.

    Args:
        f: A callable of a batch; an `nnx.Module`, called with a batch; or a pair (linen module, its variables). The
            leading axis of what it is given and of what it returns is the batch.

    Returns:
        A pure function `fn(params, batch)`, which can be sent to other processes, and params, a pytree. A callable's
            params are empty: what it closes over stays inside it.

    Raises:
        ValueError: If f is none of these, or is a class or a linen module without variables.

    >>> fn, params = as_pure_function(lambda x: 2 * x)
    >>> fn(params, 3)
    6
    """
    if isinstance(f, nnx.Module):
        return _from_nnx(f)
    if isinstance(f, tuple) and len(f) == 2 and isinstance(f[0], linen.Module):
        module, variables = f
        if not isinstance(variables, Mapping):
            raise ValueError(
                f"f is (linen module, {type(variables).__name__}); expected the variables that module.init returned, "
                "a mapping such as {'params': ...}"
            )
        return module.apply, variables
    if isinstance(f, linen.Module):
        raise ValueError(
            f"f is a linen {type(f).__name__} without variables; expected the pair (module, variables), "
            "with variables = module.init(key, x) or a checkpoint"
        )
    if isinstance(f, type) or not callable(f):
        raise ValueError(
            f"f is {f!r}; expected a callable, an nnx module (an object, not its class) or (linen module, variables)"
        )
    return functools.partial(_without_params, f), ()


def check_answers(answers: PyTree[Any], size: int) -> None:
    """Checks that a model's answers are real numbers with the batch as leading axis.

    Args:
        answers: Leaves (size, ...), arrays or `jax.ShapeDtypeStruct`s.
        size: Length of the batch.

    Raises:
        ValueError: If they are not.
    """
    leaves = jax.tree_util.tree_leaves_with_path(answers)
    if not leaves:
        raise ValueError(f"f's result is {answers!r}, which has no arrays; expected at least one, leaves (batch, ...)")
    for path, leaf in leaves:
        name = "f's result" + jax.tree_util.keystr(path)
        if leaf.ndim < 1 or leaf.shape[0] != size:
            raise ValueError(
                f"{name} has shape {leaf.shape} for a batch of {size}; expected the batch as its leading axis"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{name} has dtype {leaf.dtype}; expected real numbers, which can be decoded (logits, not classes)"
            )


def _without_params(f, _, batch):
    return f(batch)


def _from_nnx(module: nnx.Module) -> tuple[PureFunction, Params]:
    evaluating = nnx.clone(module)
    evaluating.eval()
    graph, state = nnx.split(evaluating)
    return functools.partial(_merged, graph), state


def _merged(graph, state, batch):
    return nnx.merge(graph, state)(batch)
