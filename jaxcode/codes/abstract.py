"""What every code does, and what the codes that interpolate share."""

import abc
import dataclasses
from collections.abc import Callable
from typing import TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from .._checks import check_ascending, check_mask, check_vector, is_concrete
from .matrices import apply_matrix, map_leaves

Code = TypeVar("Code")


@dataclass_transform(frozen_default=True, eq_default=False)
def code_class(*static: str) -> Callable[[type[Code]], type[Code]]:
    """Makes a class a frozen dataclass and a pytree, whose leaves are all fields but the static ones.

    Rebuilding a code from its leaves does not run the constructor's checks: JAX puts tracers, and objects that only
    stand for arrays, in place of leaves.
    """

    def decorate(cls):
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        leaves = [field.name for field in dataclasses.fields(cls) if field.name not in static]

        def flatten(code):
            keyed = [(jax.tree_util.GetAttrKey(name), getattr(code, name)) for name in leaves]
            return keyed, tuple(getattr(code, name) for name in static)

        def unflatten(values, children):
            code = object.__new__(cls)
            for name, value in (*zip(leaves, children, strict=True), *zip(static, values, strict=True)):
                object.__setattr__(code, name, value)
            return code

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return decorate


class AbstractCode(abc.ABC):
    """How K inputs become N coded inputs, and the answers of those workers that returned become K results.

    Attributes:
        num_data: K, how many inputs are encoded together.
        num_workers: N, how many coded inputs they become.
    """

    num_data: int
    num_workers: int

    @abc.abstractmethod
    def encode(self, x: PyTree[Array]) -> PyTree[Array]:
        """Encodes inputs.

        Args:
            x: Leaves of shape (K, ...), real. A code that mixes inputs turns integers into float32.

        Returns:
            The coded inputs, leaves of shape (N, ...) in the dtype of the inputs.

        Raises:
            ValueError: If a leaf's leading axis is not K.
        """

    @abc.abstractmethod
    def decode(self, y: PyTree[Array], returned: Bool[ArrayLike, "workers"]) -> PyTree[Array]:
        """Decodes the answers that came.

        Args:
            y: Leaves of shape (N, ...), real. Rows of workers that did not return are not read, whatever they hold.
            returned: Which workers returned, bool, shape (N,).

        Returns:
            The results, leaves of shape (K, ...) in the dtype of the answers; NaN for an input that is not `recovered`.

        Raises:
            ValueError: If a leaf's leading axis is not N or its dtype cannot be decoded, or returned is not bool (N,).
        """

    @abc.abstractmethod
    def recovered(self, returned: Bool[ArrayLike, "workers"]) -> Bool[Array, "data"]:
        """Which inputs have a result, given which workers returned.

        Args:
            returned: bool, shape (N,).

        Returns:
            bool, shape (K,).

        Raises:
            ValueError: If returned is not bool (N,).
        """


class AbstractLinearCode(AbstractCode):
    """A code whose encoder and decoder are matrices."""

    @abc.abstractmethod
    def encoder_matrix(self) -> Float[Array, "workers data"]:
        """The matrix, shape (N, K), that takes inputs to coded inputs; float64 with x64 on, else float32."""

    @abc.abstractmethod
    def decoder_matrix(self, returned: Bool[ArrayLike, "workers"]) -> Float[Array, "data workers"]:
        """The matrix, shape (K, N), that takes answers to results; float64 with x64 on, else float32.

        Columns of workers that did not return are zero, rows of inputs that are not recovered are NaN.
        """


class AbstractInterpolatingCode(AbstractLinearCode):
    """A code that draws a curve through the inputs at their nodes, and another through the answers at theirs.

    The encoder reads the first curve at the worker nodes, the decoder the second at the data nodes. Two answers are
    enough to decode every input; with fewer, all results are NaN.
    """

    data_nodes: np.ndarray | Array
    worker_nodes: np.ndarray | Array

    @property
    def num_data(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.data_nodes.shape[-1]

    @property
    def num_workers(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.worker_nodes.shape[-1]

    @abc.abstractmethod
    def _encoder(self) -> Float[Array, "workers data"]:
        """The encoder matrix in float64."""

    @abc.abstractmethod
    def _decoder(self, returned: Bool[Array, "workers"]) -> Float[Array, "data workers"]:
        """The decoder matrix in float64, given at least two answers; columns that did not return are zero."""

    def encoder_matrix(self) -> Float[Array, "workers data"]:
        return self._encoder().astype(jnp.result_type(float))

    def decoder_matrix(self, returned: Bool[ArrayLike, "workers"]) -> Float[Array, "data workers"]:
        recovered = self.recovered(returned)
        decoder = self._decoder(jnp.asarray(returned))
        return jnp.where(recovered[:, None], decoder.astype(jnp.result_type(float)), jnp.nan)

    def recovered(self, returned: Bool[ArrayLike, "workers"]) -> Bool[Array, "data"]:
        check_mask("returned", returned, self.num_workers)
        return jnp.broadcast_to(jnp.sum(jnp.asarray(returned)) >= 2, (self.num_data,))

    def encode(self, x: PyTree[Array]) -> PyTree[Array]:
        if is_concrete(self):
            # With known nodes the matrix is a constant of the traced program.
            with jax.ensure_compile_time_eval():
                matrix = self._encoder()
        else:
            matrix = self._encoder()
        return map_leaves("x", lambda rows: apply_matrix(matrix, rows), x, self.num_data)

    def decode(self, y: PyTree[Array], returned: Bool[ArrayLike, "workers"]) -> PyTree[Array]:
        recovered = self.recovered(returned)
        returned = jnp.asarray(returned)
        matrix = self._decoder(returned)

        def decode_rows(rows):
            return jnp.where(recovered[:, None], apply_matrix(matrix, rows, returned), jnp.nan)

        return map_leaves("y", decode_rows, y, self.num_workers)


def as_nodes(code: AbstractInterpolatingCode, *, workers_may_share: bool) -> None:
    """Checks a code's nodes and stores those that are known as float64 NumPy arrays, which x64 mode does not round."""
    for name, strictly in (("data_nodes", True), ("worker_nodes", not workers_may_share)):
        nodes = getattr(code, name)
        check_vector(name, nodes)
        check_ascending(name, nodes, strictly=strictly)
        if is_concrete(nodes):
            object.__setattr__(code, name, np.asarray(nodes, np.float64))
