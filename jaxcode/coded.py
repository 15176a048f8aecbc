"""The whole of coded inference as one function: encode, let every worker compute, decode from those that returned."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, PyTree

from ._checks import at_once, batch_size, check_mask, is_concrete, on_host
from ._float64 import x64_is_on
from ._maps import apply_to_groups
from .codes.abstract import AbstractLinearCode
from .functions import as_pure_function
from .ordering import Ordering
from .outputs import OutputSpace, as_returned
from .robust import Defence, Suspicion

Predict = Callable[..., PyTree[Array]]


def coded(
    f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]],
    code: AbstractLinearCode,
    *,
    order: Ordering | None = None,
    output: OutputSpace = as_returned,
    defence: Defence | None = None,
) -> Predict:
    r"""Makes a model answer although workers are missing.

    The batch is cut into groups of K inputs, in its own order unless another is asked for (the last one filled up with
    its last input); each group is encoded into N coded inputs, worker n computes f on its coded inputs of all
    :math:`\lceil B/K \rceil` groups, and the results are decoded from the workers that returned.

    Workers are simulated here by `vmap`. The function returned is pure, compiled on first use, and composes with jit,
    vmap, grad, jacfwd and remat; `returned` is traced, so a new mask never recompiles.

    Args:
        f: A callable, an `nnx.Module` or a pair (linen module, variables), used in evaluation mode. It is given and
            returns a batch: any pytree of arrays with a leading axis. Its results must be real numbers; logits decode
            better than probabilities. A module's parameters are those it has now: after training, call `coded` again.
        code: How inputs become coded inputs and answers become results.
        order: In which order the batch is cut into groups: a function (x, K) to a permutation of the batch, traced
            with the rest; no derivatives pass through it. `jaxcode.ordering.greedy` puts like beside like, which with
            a code that mixes inputs is where most of the accuracy is. Results come in the caller's order all the same.
        output: In which space answers are decoded; `jaxcode.outputs.logits` for a model that returns probabilities.
            Results are what the model returns all the same.
        defence: Which workers to believe of those that returned: `jaxcode.robust.leave_one_out` finds those that lie,
            from their answers to the whole batch, and decodes as if they had not returned. Everyone if not given.

    Returns:
        `predict(x, returned=None)`: leaves (B, ...) to leaves (B, ...), returned bool (N,), everyone if not given.
        Where the code cannot recover an input from these answers (with splines: fewer than two), its results are NaN.
        With a defence, `predict.inspect(x, returned=None)` gives the results and whom it suspected, a `Suspicion`.

    Raises:
        ValueError: If f or code is none of the above. From `predict`: if x has no leaves, its leading axes differ or
            are 0, returned is not bool (N,), f does not return real numbers with its batch as leading axis, or order
            does not return whole numbers (B,).

    References:
        arXiv 2406.00300, section 3.

    >>> from jaxcode.codes import SplineCode
    >>> predict = coded(jnp.sin, SplineCode.chebyshev(num_data=4, num_workers=12))
    >>> returned = jnp.arange(12) % 3 != 0  # four of the twelve never answer
    >>> x = jnp.linspace(0.0, 1.0, 4)
    >>> float(jnp.max(jnp.abs(predict(x, returned) - jnp.sin(x)))) < 0.01
    True
    """
    if not isinstance(code, AbstractLinearCode):
        raise ValueError(f"code is {code!r}; expected a code such as SplineCode.chebyshev(num_data=20, num_workers=30)")
    fn, params = as_pure_function(f)
    encoder = code.encoder_map()

    @jax.jit
    def run(params, x, decoder, returned):
        size = batch_size("x", x)
        groups = -(-size // code.num_data)
        turn = None if order is None else _checked_order(order(jax.lax.stop_gradient(x), code.num_data), size)
        if turn is not None:
            x = jax.tree.map(lambda leaf: leaf[turn], x)
        # All workers' coded inputs as one batch, the groups one after the other.
        sent = apply_to_groups("x", encoder, jax.tree.map(lambda leaf: _fill(leaf, groups * code.num_data), x), groups)
        answers = fn(params, sent)
        _check_answers(answers, groups * code.num_workers)
        answers, suspicion = output.of_answers(answers), None
        if defence is not None:
            suspicion = defence(code, answers, returned)
            decoder = code.decoder_map(suspicion.returned)
        results = apply_to_groups("f's result", decoder, answers, groups)
        results = jax.tree.map(lambda leaf: leaf[:size], output.to_results(results))
        if turn is None:
            return results, suspicion
        back = jnp.argsort(turn)
        return jax.tree.map(lambda leaf: leaf[back], results), suspicion

    @functools.lru_cache(maxsize=64)
    def known_decoder(mask: bytes, _x64: bool):
        with at_once():
            return code.decoder_map(np.frombuffer(mask, bool))

    def inspect(
        x: PyTree[Array], returned: Bool[ArrayLike, "workers"] | None = None
    ) -> tuple[PyTree[Array], Suspicion | None]:
        """Results for the batch x from the workers that returned, and whom of them the defence suspected."""
        returned = np.ones(code.num_workers, bool) if returned is None else on_host(returned)
        check_mask("returned", returned, code.num_workers)
        if defence is not None:
            return run(params, x, None, returned)
        if isinstance(returned, np.ndarray) and is_concrete(code):
            decoder = known_decoder(returned.tobytes(), x64_is_on())
        else:
            decoder = code.decoder_map(returned)
        return run(params, x, decoder, None)

    def predict(x: PyTree[Array], returned: Bool[ArrayLike, "workers"] | None = None) -> PyTree[Array]:
        """Results for the batch x from the workers that returned."""
        return inspect(x, returned)[0]

    if defence is not None:
        predict.inspect = inspect  # pyright: ignore[reportFunctionMemberAccess]
    return predict


def _checked_order(order, size):
    order = jnp.asarray(order)
    if order.shape != (size,) or not jnp.issubdtype(order.dtype, jnp.integer):
        raise ValueError(
            f"order returned {order.dtype} of shape {order.shape} for a batch of {size}; expected a permutation: "
            f"whole numbers of shape ({size},)"
        )
    return order


def _fill(leaf, size):
    """The batch filled up with its last input."""
    missing = size - leaf.shape[0]
    return jnp.concatenate([leaf, jnp.repeat(leaf[-1:], missing, axis=0)]) if missing else leaf


def _check_answers(answers, size):
    for path, leaf in jax.tree_util.tree_leaves_with_path(answers):
        name = "f's result" + jax.tree_util.keystr(path)
        if leaf.ndim < 1 or leaf.shape[0] != size:
            raise ValueError(
                f"{name} has shape {leaf.shape} for a batch of {size}; expected the batch as its leading axis"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{name} has dtype {leaf.dtype}; expected real numbers, which can be decoded (logits, not classes)"
            )
