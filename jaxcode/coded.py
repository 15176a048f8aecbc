"""The whole of coded inference as one function: encode, let every worker compute, decode from those that returned."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, PyTree

from ._checks import check_mask, is_concrete, on_host
from ._groups import check_answers, decode_groups, encode_groups, known_decoders
from .codes.abstract import AbstractLinearCode
from .functions import as_pure_function
from .ordering import Ordering
from .outputs import OutputSpace, as_returned
from .robust import Defence, Suspicion
from .workers.in_graph import WorkerMap, vmap

Predict = Callable[..., PyTree[Array]]


def coded(
    f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]],
    code: AbstractLinearCode,
    *,
    order: Ordering | None = None,
    output: OutputSpace = as_returned,
    defence: Defence | None = None,
    workers: WorkerMap | None = None,
) -> Predict:
    r"""Makes a model answer although workers are missing.

    The batch is cut into groups of K inputs, in its own order unless another is asked for (the last one filled up with
    its last input); each group is encoded into N coded inputs, worker n computes f on its coded inputs of all
    :math:`\lceil B/K \rceil` groups, and the results are decoded from the workers that returned.

    The function returned is pure, compiled on first use, and composes with jit, vmap, grad, jacfwd and remat;
    `returned` is traced, so a new mask never recompiles.

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
        workers: On which devices workers compute: `jaxcode.workers.shard_map(mesh)` spreads them over a mesh. All as
            one batch on one device, `jaxcode.workers.vmap()`, if not given.

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

    >>> import jax.numpy as jnp
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
    encoder, known = code.encoder_map(), known_decoders(code)
    on_devices = vmap() if workers is None else workers
    num_workers, everyone = code.num_workers, np.ones(code.num_workers, bool)
    nodes_are_known = is_concrete(code)

    @jax.jit
    def run(params, x, decoder, returned):
        # All workers' coded inputs as one batch.
        sent, cut = encode_groups(encoder, code.num_data, order, on_devices.place(x))
        answers = on_devices.answer(fn, params, sent, num_workers)
        check_answers(answers, cut.num_groups * num_workers)
        return decode_groups(code, decoder, answers, returned, cut, output, defence, spread=on_devices.spread)

    def inspect(
        x: PyTree[Array], returned: Bool[ArrayLike, "workers"] | None = None
    ) -> tuple[PyTree[Array], Suspicion | None]:
        """Results for the batch x from the workers that returned, and whom of them the defence suspected."""
        returned = everyone if returned is None else returned
        check_mask("returned", returned, num_workers)
        if defence is not None:
            return run(params, x, None, on_host(returned))
        if not isinstance(returned, np.ndarray):
            returned = on_host(returned)
        if nodes_are_known and isinstance(returned, np.ndarray):
            decoder = known(returned)
        else:
            decoder = code.decoder_map(returned)
        return run(params, x, decoder, None)

    def predict(x: PyTree[Array], returned: Bool[ArrayLike, "workers"] | None = None) -> PyTree[Array]:
        """Results for the batch x from the workers that returned."""
        return inspect(x, returned)[0]

    if defence is not None:
        predict.inspect = inspect  # pyright: ignore[reportFunctionMemberAccess]
    return predict
