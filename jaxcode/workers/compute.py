"""What runs inside a worker: the model with its parameters, compiled, from NumPy to NumPy."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._groups import check_answers
from ..functions import PureFunction

# Called with the worker's number, the compiled model and a batch: what the worker does in place of just computing.
Around = Callable[[int, Callable[[Any], Any], Any], Any]


class Compute:
    """A model on one device, compiled at its first batch of each shape."""

    def __init__(
        self,
        fn: PureFunction,
        params: PyTree,
        worker: int,
        around: Around | None = None,
        device: jax.Device | None = None,  # pyright: ignore[reportInvalidTypeForm]
    ):
        params = jax.device_put(unpacked(params), device)
        compiled = jax.jit(fn)

        def compute(batch):
            return jax.tree.map(np.asarray, compiled(params, jax.device_put(batch, device)))

        self._compute = compute
        self._run = compute if around is None else functools.partial(around, worker, compute)

    def __call__(self, batch: PyTree[np.ndarray]) -> Any:
        """The model's answers to a batch."""
        return self._run(batch)

    def warm_up(self, examples: Sequence[PyTree[jax.ShapeDtypeStruct]]) -> None:
        """Compiles for such batches."""
        for shapes in examples:
            self._compute(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))


class _Key:
    """A typed random key, which NumPy does not hold, as its numbers."""

    def __init__(self, key):
        self.kind, self.data = str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key))


def packed(params: PyTree) -> PyTree:
    """Parameters as NumPy arrays, to be sent to other processes."""
    return jax.tree.map(
        lambda leaf: _Key(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf),
        jax.tree.map(jnp.asarray, params),
    )


def unpacked(params: PyTree[Any]) -> PyTree[Any]:
    """What `packed` packed."""
    return jax.tree.map(_whole, params, is_leaf=lambda leaf: isinstance(leaf, _Key))


def _whole(leaf: Any) -> Any:
    return jax.random.wrap_key_data(jnp.asarray(leaf.data), impl=leaf.kind) if isinstance(leaf, _Key) else leaf


def shapes_of(batch: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes and dtypes of arrays, as JAX will have them."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype)), batch
    )


def answer_shapes(
    fn: PureFunction, params: PyTree, batch: PyTree[jax.ShapeDtypeStruct]
) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes and dtypes of f's answers to a batch.

    Raises:
        ValueError: If f does not return real numbers with its batch as leading axis.
    """
    answers = jax.eval_shape(fn, params, batch)
    check_answers(answers, jax.tree.leaves(batch)[0].shape[0])
    return answers


def refusal(answer: Any, expected: PyTree[jax.ShapeDtypeStruct]) -> str | None:
    """Why an answer cannot be used, or None if it can."""
    if jax.tree.structure(answer) != jax.tree.structure(expected):
        return f"its answer is {jax.tree.structure(answer)}; expected {jax.tree.structure(expected)}"
    for leaf, like in zip(jax.tree.leaves(answer), jax.tree.leaves(expected), strict=True):
        if not isinstance(leaf, np.ndarray) or leaf.shape != like.shape or leaf.dtype != like.dtype:
            found = f"{getattr(leaf, 'dtype', type(leaf).__name__)} of shape {np.shape(leaf)}"
            return f"its answer is {found}; expected {like.dtype} of shape {like.shape}"
        if not np.isfinite(leaf).all():
            return "its answer has NaN or infinite numbers"
    return None
