"""Batches cut into groups of K inputs, each coded for the same workers: what happens before and after the model."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from ._checks import batch_size
from ._float64 import x64_is_on
from ._maps import AbstractMap, apply_to_groups, at_once
from ._pytree import pytree
from .codes.abstract import AbstractLinearCode
from .functions import check_answers as check_answers
from .ordering import Ordering
from .outputs import OutputSpace
from .robust import Defence, Suspicion


@pytree("size", "num_groups")
class Cut:
    """How a batch was cut.

    Attributes:
        turn: Which input came in which place, shape (B,); in its own order if None.
        size: B.
        num_groups: How many groups it makes, the last one filled up with its last input.
    """

    turn: Int[Array, "batch"] | None
    size: int
    num_groups: int


def encode_groups(
    encoder: AbstractMap, num_data: int, order: Ordering | None, x: PyTree[Array]
) -> tuple[PyTree[Array], Cut]:
    """Orders a batch, cuts it into groups and encodes each.

    Returns:
        All workers' coded inputs as one batch, leaves (groups N, ...), the groups one after the other; and the cut.

    Raises:
        ValueError: If x has no leaves, its leading axes differ or are 0, or order does not return whole numbers (B,).
    """
    size = batch_size("x", x)
    cut = Cut(None, size, -(-size // num_data))
    if order is not None:
        cut = Cut(_checked_order(order(jax.lax.stop_gradient(x), num_data), size), size, cut.num_groups)
        x = jax.tree.map(lambda leaf: leaf[cut.turn], x)
    filled = jax.tree.map(lambda leaf: fill_up(leaf, num_data), x)
    return apply_to_groups("x", encoder, filled, cut.num_groups), cut


def decode_groups(
    code: AbstractLinearCode,
    decoder,
    answers: PyTree[Array],
    returned,
    cut: Cut,
    output: OutputSpace,
    defence: Defence | None,
    *,
    spread: bool = False,
) -> tuple[PyTree[Array], Suspicion | None]:
    """The batch's results, leaves (B, ...), of the groups' answers as the model returned them, leaves (groups N, ...).

    Args:
        code: The code.
        decoder: The map for the workers that returned; not read with a defence, which finds out whom to believe.
        answers: As they came.
        returned: Which workers returned, bool, shape (N,); read with a defence only.
        cut: How the batch was cut.
        output: In which space to decode.
        defence: Whom to believe; everyone if None.
        spread: Whether answers lie on several devices.

    Returns:
        The results, and whom the defence suspected.
    """
    answers, suspicion = output.of_answers(answers), None
    if defence is not None:
        suspicion = defence(code, answers, returned)
        decoder = code.decoder_map(suspicion.returned)
    results = apply_to_groups("f's result", decoder, answers, cut.num_groups, whole=spread)
    return in_the_callers_order(output.to_results(results), cut), suspicion


def in_the_callers_order(results: PyTree[Array], cut: Cut) -> PyTree[Array]:
    """The batch's own results, leaves (B, ...), of those of its groups, leaves (groups K, ...)."""
    results = jax.tree.map(lambda leaf: leaf[: cut.size], results)
    if cut.turn is None:
        return results
    back = jnp.argsort(cut.turn)
    return jax.tree.map(lambda leaf: leaf[back], results)


def known_decoders(code: AbstractLinearCode) -> Callable[[np.ndarray], AbstractMap]:
    """Decoders for masks that the host knows, of a code whose nodes are known; the latest are kept."""

    @functools.lru_cache(maxsize=64)
    def decoder(mask: bytes, _x64: bool) -> AbstractMap:
        return at_once(code.decoder_map, np.frombuffer(mask, bool))

    return lambda returned: decoder(returned.tobytes(), x64_is_on())


def fill_up(leaf: Array | np.ndarray, num_data: int) -> Array | np.ndarray:
    """A batch made up to whole groups with its last input; of NumPy's where it was."""
    missing = -leaf.shape[0] % num_data
    xp = np if isinstance(leaf, np.ndarray) else jnp
    return xp.concatenate([leaf, xp.repeat(leaf[-1:], missing, axis=0)]) if missing else leaf


def _checked_order(order, size):
    order = jnp.asarray(order)
    if order.shape != (size,) or not jnp.issubdtype(order.dtype, jnp.integer):
        raise ValueError(
            f"order returned {order.dtype} of shape {order.shape} for a batch of {size}; expected a permutation: "
            f"whole numbers of shape ({size},)"
        )
    return order
