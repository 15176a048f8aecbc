"""What users do today: send every input to several workers, or to one."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from .._checks import check_count, check_mask
from .abstract import AbstractLinearCode, code_class
from .matrices import map_leaves


@code_class("num_data", "num_workers")
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

    def encoder_matrix(self) -> Float[Array, "workers data"]:
        return _one_hot(_assignment(self), self.num_data)

    def decoder_matrix(self, returned: Bool[ArrayLike, "workers"]) -> Float[Array, "data workers"]:
        chosen = _one_hot(_first_copy(self, returned), self.num_workers)
        return jnp.where(self.recovered(returned)[:, None], chosen, jnp.nan)

    def recovered(self, returned: Bool[ArrayLike, "workers"]) -> Bool[Array, "data"]:
        return jnp.any(_copies(self, returned), axis=0)

    def encode(self, x: PyTree[Array]) -> PyTree[Array]:
        return map_leaves("x", lambda rows: rows[_assignment(self)], x, self.num_data)

    def decode(self, y: PyTree[Array], returned: Bool[ArrayLike, "workers"]) -> PyTree[Array]:
        recovered, chosen = self.recovered(returned), _first_copy(self, returned)
        return map_leaves("y", lambda rows: jnp.where(recovered[:, None], rows[chosen], jnp.nan), y, self.num_workers)


@code_class("num_data")
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

    def encoder_matrix(self) -> Float[Array, "workers data"]:
        return jnp.eye(self.num_data)

    def decoder_matrix(self, returned: Bool[ArrayLike, "workers"]) -> Float[Array, "data workers"]:
        return jnp.where(self.recovered(returned)[:, None], jnp.eye(self.num_data), jnp.nan)

    def recovered(self, returned: Bool[ArrayLike, "workers"]) -> Bool[Array, "data"]:
        check_mask("returned", returned, self.num_workers)
        return jnp.asarray(returned)

    def encode(self, x: PyTree[Array]) -> PyTree[Array]:
        return map_leaves("x", lambda rows: rows, x, self.num_data)

    def decode(self, y: PyTree[Array], returned: Bool[ArrayLike, "workers"]) -> PyTree[Array]:
        recovered = self.recovered(returned)
        return map_leaves("y", lambda rows: jnp.where(recovered[:, None], rows, jnp.nan), y, self.num_workers)


def _assignment(code: ReplicationCode) -> np.ndarray:
    """Which input each worker computes."""
    return np.arange(code.num_workers) % code.num_data


def _copies(code: ReplicationCode, returned) -> Bool[Array, "copies data"]:
    """Which copies of which input returned; a copy that no worker was given did not."""
    check_mask("returned", returned, code.num_workers)
    rounds = -(-code.num_workers // code.num_data)
    padding = rounds * code.num_data - code.num_workers
    return jnp.pad(jnp.asarray(returned), (0, padding)).reshape(rounds, code.num_data)


def _first_copy(code: ReplicationCode, returned) -> Array:
    """The worker whose answer is taken for each input."""
    first_round = jnp.argmax(_copies(code, returned), axis=0).astype(jnp.int32)
    return first_round * code.num_data + np.arange(code.num_data, dtype=np.int32)


def _one_hot(index, length):
    return (jnp.asarray(index)[:, None] == jnp.arange(length)).astype(jnp.result_type(float))
