"""Computes a model inside a worker: compiled, with its parameters on the worker's device, from NumPy to NumPy."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..functions import PureFunction, check_answers

# Called in place of the compiled model with the worker's number, the compiled model and a batch; returns the worker's
# answer.
Interceptor = Callable[[int, Callable[[Any], Any], Any], Any]


@final
class CompiledModel:
    """Computes a model on one device; compiles at the first batch of each shape.

    Args:
        fn: The model, a pure function of params and a batch.
        params: Its parameters, as they are or as `pack` returns them.
        worker: Index of the worker.
        interceptor: See `Interceptor`; None to call the compiled model itself.
        device: Where to compute; JAX's default if None.
    """

    def __init__(
        self,
        fn: PureFunction,
        params: PyTree,
        worker: int,
        interceptor: Interceptor | None = None,
        device: jax.Device | None = None,  # pyright: ignore[reportInvalidTypeForm]
    ):
        params = jax.device_put(unpack(params), device)
        compiled = jax.jit(fn)

        def compute(batch):
            return jax.tree.map(np.asarray, compiled(params, jax.device_put(batch, device)))

        self._compute = compute
        self._run = compute if interceptor is None else functools.partial(interceptor, worker, compute)

    def __call__(self, batch: PyTree[np.ndarray]) -> Any:
        """Computes the model's answers to a batch, NumPy arrays."""
        return self._run(batch)

    def warm_up(self, examples: Sequence[PyTree[jax.ShapeDtypeStruct]]) -> None:
        """Compiles for batches of these shapes and dtypes."""
        for shapes in examples:
            self._compute(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))


@final
class _PackedKey:
    """Holds a typed random key, which is no NumPy array, as the name of its algorithm and its data."""

    def __init__(self, key):
        self.impl, self.data = str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key))


def pack(params: PyTree) -> PyTree:
    """Converts parameters to NumPy arrays, to be sent to other processes."""
    return jax.tree.map(
        lambda leaf: _PackedKey(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf),
        jax.tree.map(jnp.asarray, params),
    )


def unpack(params: PyTree[Any]) -> PyTree[Any]:
    """Converts what `pack` returned back to parameters."""
    return jax.tree.map(
        lambda leaf: (
            jax.random.wrap_key_data(jnp.asarray(leaf.data), impl=leaf.impl) if isinstance(leaf, _PackedKey) else leaf
        ),
        params,
        is_leaf=lambda leaf: isinstance(leaf, _PackedKey),
    )


def shapes_of(batch: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of arrays, as JAX will have them."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype)), batch
    )


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """Holds the shapes and dtypes of a batch and of the model's answers to it.

    A pool makes one object for each, so that signatures are equal only if they are the same object.

    Attributes:
        batch: Leaves (batch, ...).
        answers: Leaves (batch, ...).
    """

    batch: PyTree[jax.ShapeDtypeStruct]
    answers: PyTree[jax.ShapeDtypeStruct]


def answer_shapes(
    fn: PureFunction, params: PyTree, batch: PyTree[jax.ShapeDtypeStruct]
) -> PyTree[jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of f's answers to a batch, leaves (batch, ...).

    Raises:
        ValueError: If f does not return numbers with its batch as leading axis.
    """
    answers = jax.eval_shape(fn, params, batch)
    check_answers(answers, jax.tree.leaves(batch)[0].shape[0], allow_integers=True)
    return answers


def find_invalid(answer: Any, expected: PyTree[jax.ShapeDtypeStruct]) -> str | None:
    """Returns why an answer is invalid: of another structure, shape or dtype, or not finite. None if it is valid.

    Args:
        answer: What a worker returned.
        expected: Shapes and dtypes of the model's answers.
    """
    if jax.tree.structure(answer) != jax.tree.structure(expected):
        return f"its answer is {jax.tree.structure(answer)}; expected {jax.tree.structure(expected)}"
    for leaf, spec in zip(jax.tree.leaves(answer), jax.tree.leaves(expected), strict=True):
        if not isinstance(leaf, np.ndarray):
            return f"its answer is a {type(leaf).__name__}; expected a NumPy array, {spec.dtype} of shape {spec.shape}"
        if leaf.shape != spec.shape or leaf.dtype != spec.dtype:
            return f"its answer is {leaf.dtype} of shape {leaf.shape}; expected {spec.dtype} of shape {spec.shape}"
        if not np.isfinite(leaf).all():
            return "its answer has NaN or infinite numbers"
    return None
