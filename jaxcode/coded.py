"""The whole of coded inference as one function: encode, let every worker compute, decode from those that returned."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, PyTree

from ._checks import check_mask
from .codes.abstract import AbstractCode
from .functions import as_pure_function

Predict = Callable[..., PyTree[Array]]


def coded(f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]], code: AbstractCode) -> Predict:
    r"""Makes a model answer although workers are missing.

    The batch is cut into groups of K inputs in its own order (the last one filled up with its last input); each group
    is encoded into N coded inputs, worker n computes f on its coded inputs of all :math:`\lceil B/K \rceil` groups,
    and the results are decoded from the workers that returned.

    Workers are simulated here by `vmap`. The function returned is pure, compiled on first use, and composes with jit,
    vmap, grad, jacfwd and remat; `returned` is traced, so a new mask never recompiles.

    Args:
        f: A callable, an `nnx.Module` or a pair (linen module, variables), used in evaluation mode. It is given and
            returns a batch: any pytree of arrays with a leading axis. Its results must be real numbers; logits decode
            better than probabilities. A module's parameters are those it has now: after training, call `coded` again.
        code: How inputs become coded inputs and answers become results.

    Returns:
        `predict(x, returned=None)`: leaves (B, ...) to leaves (B, ...), returned bool (N,), everyone if not given.
        Where the code cannot recover an input from these answers (with splines: fewer than two), its results are NaN.

    Raises:
        ValueError: If f or code is none of the above. From `predict`: if x has no leaves, its leading axes differ or
            are 0, returned is not bool (N,), or f does not return real numbers with its batch as leading axis.

    References:
        arXiv 2406.00300, section 3.

    >>> from jaxcode.codes import SplineCode
    >>> predict = coded(jnp.sin, SplineCode.chebyshev(num_data=4, num_workers=12))
    >>> returned = jnp.arange(12) % 3 != 0  # four of the twelve never answer
    >>> x = jnp.linspace(0.0, 1.0, 4)
    >>> float(jnp.max(jnp.abs(predict(x, returned) - jnp.sin(x)))) < 0.01
    True
    """
    if not isinstance(code, AbstractCode):
        raise ValueError(f"code is {code!r}; expected a code such as SplineCode.chebyshev(num_data=20, num_workers=30)")
    fn, params = as_pure_function(f)

    @jax.jit
    def run(params, x, returned):
        size = _batch_size(x)
        groups = -(-size // code.num_data)
        sent = code.encode(jax.tree.map(lambda leaf: _to_groups(leaf, code.num_data, groups), x))
        answers = jax.vmap(lambda batch: fn(params, batch))(sent)
        _check_answers(answers, groups)
        return jax.tree.map(lambda leaf: _from_groups(leaf, size), code.decode(answers, returned))

    def predict(x: PyTree[Array], returned: Bool[ArrayLike, "workers"] | None = None) -> PyTree[Array]:
        """Results for the batch x from the workers that returned."""
        mask = np.ones(code.num_workers, bool) if returned is None else returned
        check_mask("returned", mask, code.num_workers)
        return run(params, x, mask)

    return predict


def _batch_size(x) -> int:
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise ValueError(f"x is {x!r}; expected at least one array of inputs")
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"x has leaves of shapes {[leaf.shape for leaf in leaves]}; expected one leading axis, the batch, "
            "of the same length in all and at least 1"
        )
    return sizes.pop()


def _to_groups(leaf, num_data, groups):
    """(B, ...) to (K, groups, ...): every group holds neighbours of the batch."""
    missing = groups * num_data - leaf.shape[0]
    if missing:
        leaf = jnp.concatenate([leaf, jnp.repeat(leaf[-1:], missing, axis=0)])
    return jnp.swapaxes(leaf.reshape(groups, num_data, *leaf.shape[1:]), 0, 1)


def _from_groups(leaf, size):
    """(K, groups, ...) back to (B, ...)."""
    leaf = jnp.swapaxes(leaf, 0, 1)
    return leaf.reshape(-1, *leaf.shape[2:])[:size]


def _check_answers(answers, groups):
    for path, leaf in jax.tree_util.tree_leaves_with_path(answers):
        name = "f's result" + jax.tree_util.keystr(path)
        if leaf.ndim < 2 or leaf.shape[1] != groups:
            raise ValueError(
                f"{name} has shape {leaf.shape[1:]} for a batch of {groups}; expected the batch as its leading axis"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{name} has dtype {leaf.dtype}; expected real numbers, which can be decoded (logits, not classes)"
            )
