"""Computes features of inputs whose distances are changes of a model's answers."""

import functools
import math
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._arrays import as_arrays
from .._pytree import pytree
from .._sharding import replicate, shard_like
from ..checks import batch_size, check_count
from ..functions import Model, as_pure_function

__all__ = ["LinearFeatures", "sensitivity"]

# Numbers in all derivatives together, 256 MB of float32: fewer limit the directions that large inputs get.
_MAX_NUMBERS = 2**26


def sensitivity(
    f: Model,
    x_sample: PyTree[ArrayLike],
    *,
    num_probes: int = 1024,
    model_batch: int = 128,
    key: PRNGKeyArray | None = None,
) -> "LinearFeatures":
    r"""Computes features for `greedy` whose distances are changes of a model's answers.

    For coding, two inputs are similar if the model's answer changes little between them. To first order, and on average
    over the sample, it changes by

    .. math::
        \operatorname{E} \|J (x - x')\|^2 \approx \frac1n \sum_{i=1}^n (v_i^T J(x_i) (x - x'))^2,

    with J the model's derivative at inputs of the sample, and v random directions among its outputs. The features of x
    are the n numbers :math:`v_i^T J(x_i) x / \sqrt n`, a linear map that costs far less than the model.

    Args:
        f: A differentiable model, as `jaxcode.coded` takes it.
        x_sample: Inputs, leaves (B, ...) of real numbers.
        num_probes: n, how many derivatives are computed, each at the cost of two to three runs of the model on one
            input. More of them resolve more directions. For large inputs there are fewer, so that the derivatives have
            at most 2^26 numbers.
        model_batch: How many inputs the model is differentiated on at a time.
        key: Random key of the directions; that of seed 0 if not given.

    Returns:
        A function from a batch to its features, (B, n) in float32: `Greedy(key=sensitivity(...))`.

    Raises:
        ValueError: If x_sample has no leaves, leading axes that differ or numbers that are not real, num_probes or
            model_batch is not a whole number of at least 1, or f is no model.
        TypeError, ValueError, NotImplementedError: If the model has no derivatives.

    References:
        Constantine, Dow and Wang, Active subspace methods in theory and practice, arXiv 1304.2070.

    >>> features = sensitivity(lambda x: x[:, 0] ** 2, jnp.array([[1.0, 5.0], [2.0, 6.0]]), num_probes=4)
    >>> near, far = features(jnp.array([[0.0, 0.0], [0.0, 9.0], [1.0, 0.0]]))[1:]
    >>> bool(jnp.sum(near**2) == 0), bool(jnp.sum(far**2) > 1)
    (True, True)
    """
    check_count("num_probes", num_probes)
    model_batch = check_count("model_batch", model_batch)
    size = batch_size("x_sample", x_sample)
    x = as_arrays("x_sample", x_sample)
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = "x_sample" + jax.tree_util.keystr(path)
            raise ValueError(f"{name} has dtype {leaf.dtype}; expected real numbers, which have derivatives")
    fn, params = as_pure_function(f)
    numbers_per_input = sum(leaf.size for leaf in jax.tree.leaves(x)) // size
    num_probes = max(1, min(num_probes, _MAX_NUMBERS // max(1, numbers_per_input)))

    # All runs have one size, so that they compile once, and repeat the sample as often as needed.
    x, model_batch = replicate(x), min(model_batch, size)
    key = jax.random.key(jax.device_put(np.uint32(0))) if key is None else key
    keys = jax.random.split(key, -(-num_probes // model_batch))
    rows = (np.arange(len(keys) * model_batch, dtype=np.int32) % size).reshape(-1, model_batch)
    batches = [
        _pull_back_probes(fn, params, x, *jax.device_put((batch_rows, np.int32(run))), keys)
        for run, batch_rows in enumerate(rows)
    ]
    return LinearFeatures(_concatenate(batches, num_probes))


@final
@pytree(eq=False)
class LinearFeatures:
    r"""Computes features that are linear in the inputs: :math:`d_i^T x / \sqrt n` for n directions d.

    Two of these are equal only if they are the same object.

    Attributes:
        directions: One tree of inputs for each feature, leaves (n, ...).
    """

    directions: PyTree[Array | np.ndarray]

    def __call__(self, x: PyTree[ArrayLike]) -> Float[Array, "batch features"]:
        """Computes the features of a batch, leaves (B, ...), in float32.

        Raises:
            ValueError: If the structure or the shapes of x differ from those of the directions.
        """
        batch_size("x", x)
        x = as_arrays("x", x)
        shapes, expected = (jax.tree.map(lambda leaf: leaf.shape[1:], tree) for tree in (x, self.directions))
        if shapes != expected:
            raise ValueError(
                f"x has leaves of shapes {shapes} without their leading axis; expected {expected}, those of the sample "
                "that the features were made from: give a batch of such inputs"
            )
        return _project(replicate(x, num_sharded=1), self.directions)


@functools.partial(jax.jit, static_argnums=0)
def _pull_back_probes(fn, params, x, rows, run, keys):
    """Computes derivatives at some rows of x, each along a random direction of the answers."""
    batch = jax.tree.map(lambda leaf: leaf[rows], x)
    answers, pull_back = jax.vjp(lambda batch: fn(params, batch), batch)
    leaves, structure = jax.tree.flatten(answers)
    leaf_keys = jax.random.split(keys[run], len(leaves))
    directions = [
        shard_like(jax.random.normal(key, leaf.shape, leaf.dtype), leaf)
        for key, leaf in zip(leaf_keys, leaves, strict=True)
    ]
    return pull_back(jax.tree.unflatten(structure, directions))[0]


@functools.partial(jax.jit, static_argnums=1)
def _concatenate(batches, num_probes):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:num_probes].astype(jnp.float32), *batches)


@jax.jit
def _project(x, directions):
    def products(leaf, direction):
        rows = leaf.reshape(leaf.shape[0], -1).astype(jnp.float32)
        return jnp.matmul(rows, direction.reshape(len(direction), -1).T, precision=jax.lax.Precision.HIGHEST)

    features = jax.tree.leaves(jax.tree.map(products, x, directions))
    return functools.reduce(jnp.add, features) / math.sqrt(features[0].shape[1])
