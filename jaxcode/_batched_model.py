"""Runs a model on batches of one size, so that it compiles once."""

import functools
from typing import final

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree
from tqdm import tqdm

from ._arrays import pad
from .checks import batch_size
from .functions import Params, PureFunction, check_answers


@final
class BatchedModel:
    """Runs a model on batches of one size, so that it compiles once, and counts the inputs that it runs on.

    Args:
        fn: The model, a pure function of its parameters and a batch.
        params: Its parameters.
        size: Inputs in a batch.
        allow_integers: Whether the model may return integers.

    Attributes:
        count: How many inputs, coded or not, it has run on.
    """

    def __init__(self, fn: PureFunction, params: Params, size: int, allow_integers: bool = False):
        self._fn, self._params, self._size, self._allow_integers = fn, params, size, allow_integers
        self.count = 0

    def __call__(self, x: PyTree[ArrayLike], *, progress: bool = False) -> PyTree[np.ndarray]:
        """Computes the answers to any number of inputs, in the host's memory.

        Args:
            x: Leaves (B, ...).
            progress: Whether to show a progress bar on standard error.

        Returns:
            Leaves (B, ...).

        Raises:
            ValueError: If the model does not return real numbers with the batch as leading axis.
        """
        return self._run_in_batches(_answer, x, progress=progress)

    def pull_back(self, x: PyTree[ArrayLike], cotangents: PyTree[np.ndarray]) -> PyTree[np.ndarray]:
        """Computes the derivatives of a number with respect to inputs, given those with respect to their answers.

        Args:
            x: Inputs, leaves (B, ...).
            cotangents: Derivatives with respect to the model's answers to them, leaves (B, ...).

        Returns:
            Leaves (B, ...).

        Raises:
            TypeError, ValueError, NotImplementedError: If the model has no derivatives.
        """
        return self._run_in_batches(_pull_back, x, cotangents)

    def _run_in_batches(self, run, *trees, progress=False):
        total = batch_size("x", trees)
        self.count += total
        batches = []
        starts = range(0, total, self._size)
        for start in tqdm(starts, "asking the model", unit="batch", disable=not progress, mininterval=1.0):
            stop = start + self._size
            batch = jax.tree.map(lambda leaf, s=slice(start, stop): pad(np.asarray(leaf[s]), self._size), trees)
            batches.append(jax.device_get(run(self._fn, self._params, *batch)))
            if run is _answer:
                check_answers(batches[-1], self._size, self._allow_integers)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:total], *batches)


# Compiled once for all models of one structure.
@functools.partial(jax.jit, static_argnums=0)
def _answer(fn, params, x):
    return fn(params, x)


@functools.partial(jax.jit, static_argnums=0)
def _pull_back(fn, params, x, cotangents):
    return jax.vjp(lambda x: fn(params, x), x)[1](cotangents)[0]
