"""Fits Gaussian processes by which replication's lost inputs are predicted, on a sample, for tuning to try."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from ..interpolants.kernel import JITTER, SMOOTHNESSES, Process, spread_of
from ..outputs import OutputSpace
from .losses import Loss, squared_error

# Processes that are tried: of each smoothness, lengths in units of the largest distance between inputs of a batch, and
# shares without correlation. Inputs of many dimensions are all at about the same distance, and a length of many times
# that makes a nearly linear function; of one dimension, hundreds tell shapes a fiftieth of their range.
_LENGTHS = tuple(np.geomspace(0.02, 8.0, 10))
_NUGGETS = (0.0, 1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
# Inputs whose processes are compared, at most: the time grows with their number and the square of the batch.
_NUM_INPUTS = 1600
# Inputs of a batch that tell about each other, at most.
_LARGEST_BATCH = 512
# Numbers in the inputs that are compared, at most, of a batch and more.
_NUM_NUMBERS = 2**26


def fit_by_leaving_out(
    x: PyTree[np.ndarray],
    targets: PyTree[np.ndarray],
    guesses: PyTree[np.ndarray],
    loss: Loss,
    output: OutputSpace,
) -> Process:
    r"""Fits the process by which answers to an input are predicted best from those to the other inputs of its batch.

    With residuals r to the guesses, of all inputs of a batch, and A the inverse of their covariance, input i's is
    predicted from the others' with the error :math:`(A r)_i / A_{ii}`.

    Args:
        x: Inputs of whole batches, leaves (batches, K, groups, ...).
        targets: The model's answers to them.
        guesses: Prior means of these, as the model returns them.
        loss: Of the results of a group, leaves (K, ...), and the model's answers.
        output: The space in which answers are decoded.

    Returns:
        The process of the least mean loss, or squared error where losses are equal.

    References:
        Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, section 5.4.2.
    """
    num_data, num_groups = jax.tree.leaves(x)[0].shape[1:3]
    num_groups = min(num_groups, max(1, _LARGEST_BATCH // num_data))
    numbers = num_data * num_groups * sum(math.prod(leaf.shape[3:]) for leaf in jax.tree.leaves(x))
    num_batches = max(1, min(_NUM_INPUTS // (num_data * num_groups), _NUM_NUMBERS // numbers))
    x, targets, guesses = jax.tree.map(lambda leaf: leaf[:num_batches, :, :num_groups], (x, targets, guesses))
    features = _rows(x)
    values, means = output.transform(targets), output.transform(guesses)
    residuals = _rows(values) - _rows(means)
    measure = _compile(loss, output)
    extent = float(spread_of(jnp.asarray(features, jnp.float32)))
    squares = _squared_distances(features)
    best, best_rank = Process(2.5, extent, _NUGGETS[-1]), (np.inf, np.inf)
    for smoothness in SMOOTHNESSES:
        for length in _LENGTHS:
            process = Process(smoothness, length * extent, 0.0)
            with jax.enable_x64(True):
                correlation = np.asarray(process.correlation(jnp.asarray(squares)))
            eigenvalues, vectors = np.linalg.eigh(correlation)
            rotated = np.swapaxes(vectors, 1, 2) @ residuals
            for nugget in _NUGGETS:
                inverses = 1 / np.maximum(eigenvalues + nugget + JITTER, JITTER)
                precision = np.sum(vectors**2 * inverses[:, None], axis=2)
                errors = vectors @ (inverses[..., None] * rotated) / precision[..., None]
                rank = tuple(float(value) for value in measure(_unrows(errors, values), values, targets))
                if rank < best_rank:
                    best, best_rank = Process(smoothness, length * extent, nugget), rank
    return best


@functools.cache
def _compile(loss: Loss, output: OutputSpace) -> Callable:
    """Compiles the mean loss and squared error of results with such errors."""

    @jax.jit
    def measure(errors, values, targets):
        results = jax.tree.map(lambda value, error: value - error.astype(value.dtype), values, errors)
        results = output.inverse_transform(results)

        def mean(loss):
            of_groups = jax.vmap(jax.vmap(loss, in_axes=1))
            return jnp.mean(of_groups(results, targets))

        return mean(loss), mean(squared_error)

    return measure


def _rows(tree) -> Float[np.ndarray, "batches inputs numbers"]:
    """Makes rows of float64 numbers of leaves (batches, K, groups, ...)."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    shape = (leaves[0].shape[0], leaves[0].shape[1] * leaves[0].shape[2])
    return np.concatenate([leaf.reshape(*shape, -1) for leaf in leaves], axis=2)


def _unrows(rows, tree):
    """Makes leaves like those of a tree of rows."""
    leaves, structure = jax.tree.flatten(tree)
    splits = np.cumsum([leaf[0, 0, 0].size for leaf in leaves])[:-1]
    parts = np.split(rows.astype(np.float32), splits, axis=2)
    return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def _squared_distances(features):
    centred = features - features.mean(axis=1, keepdims=True)
    norms = np.sum(centred**2, axis=2)
    products = centred @ np.swapaxes(centred, 1, 2)
    return np.maximum(norms[:, :, None] + norms[:, None] - 2 * products, 0.0)
