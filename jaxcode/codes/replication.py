"""What users do today: send every input to several workers, or to one."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from .._checks import check_count, check_mask, on_host
from .._maps import AbstractMap, Selection
from .._pytree import pytree
from .abstract import AbstractLinearCode


@pytree("num_data", "num_workers", eq=False)
class ReplicationCode(AbstractLinearCode):
    """Worker n computes input n mod K; the first copy that returned is the result, an input nobody returned is lost.

    Attributes:
        num_data: K >= 1.
        num_workers: N >= K.

    Raises:
        ValueError: If the numbers are not whole, or N < K.

    >>> code = ReplicationCode(num_data=2, num_workers=5)
    >>> code.encode(jnp.array([1.0, 2.0]))
    Array([1., 2., 1., 2., 1.], dtype=float32)
    >>> code.decode(code.encode(jnp.array([1.0, 2.0])), jnp.array([False, False, True, False, True]))
    Array([ 1., nan], dtype=float32)
    """

    num_data: int
    num_workers: int

    def __post_init__(self):
        num_data = check_count("num_data", self.num_data)
        if check_count("num_workers", self.num_workers) < num_data:
            raise ValueError(f"num_workers is {self.num_workers}; expected at least num_data, {num_data}")

    def encoder_map(self) -> AbstractMap:
        return Selection(assignment(self), self.num_data)

    def decoder_map(self, returned: Bool[ArrayLike, "workers"]) -> AbstractMap:
        copies = _copies(self, returned)
        xp = np if isinstance(copies, np.ndarray) else jnp
        # The first copy that returned.
        row = xp.argmax(copies, axis=0).astype(np.int32) * self.num_data + np.arange(self.num_data, dtype=np.int32)
        return Selection(row, self.num_workers, gives=xp.any(copies, axis=0))

    def recovered(self, returned: Bool[ArrayLike, "workers"]) -> Bool[Array | np.ndarray, "data"]:
        return _copies(self, returned).max(axis=0)


@pytree("num_data", eq=False)
class UncodedCode(AbstractLinearCode):
    """One worker for each input, every one of them needed.

    Attributes:
        num_data: K >= 1, and N.

    Raises:
        ValueError: If the number is not whole, or below 1.

    >>> UncodedCode(num_data=2).decode(jnp.array([1.0, 2.0]), jnp.array([False, True]))
    Array([nan,  2.], dtype=float32)
    """

    num_data: int

    def __post_init__(self):
        check_count("num_data", self.num_data)

    @property
    def num_workers(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.num_data

    def encoder_map(self) -> AbstractMap:
        return Selection(np.arange(self.num_data, dtype=np.int32), self.num_data)

    def decoder_map(self, returned: Bool[ArrayLike, "workers"]) -> AbstractMap:
        check_mask("returned", returned, self.num_workers)
        return Selection(np.arange(self.num_data, dtype=np.int32), self.num_data, gives=on_host(returned))

    def recovered(self, returned: Bool[ArrayLike, "workers"]) -> Bool[Array | np.ndarray, "data"]:
        check_mask("returned", returned, self.num_workers)
        return on_host(returned)


def assignment(code: ReplicationCode) -> np.ndarray:
    """Which input each worker computes."""
    return np.arange(code.num_workers, dtype=np.int32) % code.num_data


def _copies(code: ReplicationCode, returned) -> Bool[Array | np.ndarray, "copies data"]:
    """Which copies of which input returned; a copy that no worker was given did not."""
    check_mask("returned", returned, code.num_workers)
    returned = on_host(returned)
    rounds = -(-code.num_workers // code.num_data)
    padding = rounds * code.num_data - code.num_workers
    xp = np if isinstance(returned, np.ndarray) else jnp
    return xp.pad(returned, (0, padding)).reshape(rounds, code.num_data)
