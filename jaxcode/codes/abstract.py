"""What every code does, and what the codes that interpolate share."""

import abc

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from .._checks import check_ascending, check_mask, check_vector, is_concrete, on_host
from .._float64 import halve
from .._maps import AbstractMap, Matrix, apply_to_tree, at_once


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
    def recovered(self, returned: Bool[ArrayLike, "workers"]) -> Bool[Array | np.ndarray, "data"]:
        """Which inputs have a result, given which workers returned.

        Args:
            returned: bool, shape (N,).

        Returns:
            bool, shape (K,); of NumPy's where the host knows who returned, with nothing to compute elsewhere.

        Raises:
            ValueError: If returned is not bool (N,).
        """


class AbstractLinearCode(AbstractCode):
    """A code whose encoder and decoder are linear."""

    @abc.abstractmethod
    def encoder_map(self) -> AbstractMap:
        """The map from inputs to coded inputs."""

    @abc.abstractmethod
    def decoder_map(self, returned: Bool[ArrayLike, "workers"]) -> AbstractMap:
        """The map from answers to results.

        With known nodes and a mask in the host's memory it is prepared there, with nothing to compile, and may be an
        argument of jitted functions; with x64 off they round it to float32, as they do all arguments.
        """

    def encode(self, x: PyTree[Array]) -> PyTree[Array]:
        return apply_to_tree("x", self.encoder_map(), x, self.num_data)

    def decode(self, y: PyTree[Array], returned: Bool[ArrayLike, "workers"]) -> PyTree[Array]:
        return apply_to_tree("y", self.decoder_map(returned), y, self.num_workers)

    def encoder_matrix(self) -> Float[Array, "workers data"]:
        """The matrix, shape (N, K), that takes inputs to coded inputs; float64 with x64 on, else float32."""
        return self.encoder_map().matrix()

    def decoder_matrix(self, returned: Bool[ArrayLike, "workers"]) -> Float[Array, "data workers"]:
        """The matrix, shape (K, N), that takes answers to results; float64 with x64 on, else float32.

        Columns of workers that did not return are zero, rows of inputs that are not recovered are NaN.
        """
        return self.decoder_map(returned).matrix()


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
    def encoding_curve(self) -> AbstractMap:
        """The curve through inputs, read at the worker nodes."""

    @abc.abstractmethod
    def decoding_curve(self, returned: Bool[Array | np.ndarray, "workers"]) -> AbstractMap:
        """The curve through the answers that came, read at the data nodes."""

    def encoder_map(self) -> AbstractMap:
        if not is_concrete(self):
            return self.encoding_curve()
        # With known nodes it is a constant of the traced program.
        return at_once(self.encoding_curve)

    def decoder_map(self, returned: Bool[ArrayLike, "workers"]) -> AbstractMap:
        check_mask("returned", returned, self.num_workers)
        return self.decoding_curve(on_host(returned))

    def recovered(self, returned: Bool[ArrayLike, "workers"]) -> Bool[Array | np.ndarray, "data"]:
        check_mask("returned", returned, self.num_workers)
        returned = on_host(returned)
        xp = np if isinstance(returned, np.ndarray) else jnp
        return xp.broadcast_to(returned.sum() >= 2, (self.num_data,))


def curve_matrix(
    entries: Float[Array, "results rows"], returned: Bool[Array | np.ndarray, "rows"] | None = None
) -> AbstractMap:
    """A curve that is given as a float64 matrix with zero columns where workers did not return."""
    if returned is None:
        return Matrix(halve(entries))
    returned = jnp.asarray(returned)
    return Matrix(halve(entries), returned, jnp.broadcast_to(jnp.sum(returned) >= 2, entries.shape[:1]))


def as_nodes(code: AbstractInterpolatingCode, *, workers_may_share: bool) -> None:
    """Checks a code's nodes and stores those that are known as float64 NumPy arrays, which x64 mode does not round."""
    for name, strictly in (("data_nodes", True), ("worker_nodes", not workers_may_share)):
        nodes = getattr(code, name)
        check_vector(name, nodes)
        check_ascending(name, nodes, strictly=strictly)
        if is_concrete(nodes):
            object.__setattr__(code, name, np.asarray(nodes, np.float64))
