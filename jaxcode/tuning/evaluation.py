"""What a code would lose: the model's answers at its nodes, decoded under many straggler sets."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from .. import metrics
from .._maps import apply_to_groups
from ..checks import batch_size
from ..codes import ReplicationCode, SplineCode
from ..outputs import OutputSpace
from ..splines.maps import spline_map

# From results and the model's own answers, leaves (K, ...), to a number.
Loss = Callable[[PyTree[Array], PyTree[Array]], Float[Array, ""]]


def disagreement(estimates: Float[Array, "data classes"], targets: Float[Array, "data classes"]) -> Float[Array, ""]:
    """Share of inputs that get another class than the model gives them; a lost input is one of them."""
    return 1 - metrics.agreement(estimates, targets)


def squared_error(estimates: PyTree[Array], targets: PyTree[Array]) -> Float[Array, ""]:
    """Mean over inputs of the squared error norm, over all leaves."""

    def of_leaf(a, b):
        wide = jnp.promote_types(a.dtype, jnp.float32)
        return jnp.sum((a.astype(wide) - b.astype(wide)) ** 2) / a.shape[0]

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, estimates, targets)), jnp.zeros(()))


class Model:
    """Runs a model on batches of one size, so that it compiles once, and counts the inputs it has run on."""

    def __init__(self, fn: Callable, params: PyTree, size: int):
        self._params, self._size = params, size
        self._run = jax.jit(fn)
        self._pull_back = jax.jit(lambda params, x, by_answers: jax.vjp(lambda x: fn(params, x), x)[1](by_answers)[0])
        self.count = 0

    def __call__(self, x: PyTree[ArrayLike]) -> PyTree[np.ndarray]:
        """Answers to any number of inputs, in the host's memory."""
        return self._in_parts(self._run, x)

    def pull_back(self, x: PyTree[ArrayLike], by_answers: PyTree[np.ndarray]) -> PyTree[np.ndarray]:
        """Derivatives by inputs, of a number whose derivatives by the model's answers to them are given."""
        return self._in_parts(self._pull_back, x, by_answers)

    def _in_parts(self, run, *trees):
        total = batch_size("x", trees)
        self.count += total
        parts = []
        for start in range(0, total, self._size):
            # The last part is filled up with its last input.
            rows = np.minimum(np.arange(start, start + self._size), total - 1)
            parts.append(jax.device_get(run(self._params, *jax.tree.map(lambda leaf, rows=rows: leaf[rows], trees))))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:total], *parts)


class Curve:
    """What workers would answer at nodes of the curves through groups of inputs; each node is computed once.

    Args:
        model: The model.
        x: Inputs, leaves (groups, K, ...).
        targets: The model's answers to them, leaves (groups, K, ...).
        data_nodes: Where the inputs sit, shape (K,).
        smoothing: The encoder's.
    """

    def __init__(
        self,
        model: Model,
        x: PyTree[np.ndarray],
        targets: PyTree[np.ndarray],
        data_nodes: np.ndarray,
        smoothing: float = 0.0,
    ):
        self._model, self.x, self.targets = model, x, targets
        self.data_nodes, self._smoothing = data_nodes, smoothing
        # The answers at each node of the first so many groups.
        self._known: dict[float, PyTree[np.ndarray]] = {}
        if smoothing == 0:
            for k, node in enumerate(data_nodes):
                self._known[float(node)] = jax.tree.map(lambda leaf, k=k: leaf[:, k], targets)

    def smoothed(self, smoothing: float) -> "Curve":
        """The same with another smoothing."""
        return Curve(self._model, self.x, self.targets, self.data_nodes, smoothing)

    def answers(self, worker_nodes: np.ndarray, groups: int) -> PyTree[np.ndarray]:
        """Answers at the nodes of the first so many groups, leaves (groups, N, ...)."""
        wanted = np.unique(worker_nodes)
        known = np.array([self._groups_known(node) for node in wanted])
        for start in np.unique(known[known < groups]):
            self._compute(wanted[known == start], len(worker_nodes), int(start), groups)
        rows = [jax.tree.map(lambda leaf: leaf[:groups], self._known[float(node)]) for node in worker_nodes]
        return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *rows)

    def slope(self, worker_nodes: np.ndarray, by_answers: PyTree[np.ndarray]) -> float:
        """How a number changes with the logarithm of the smoothing, of its derivatives by all answers at the nodes.

        Raises:
            TypeError, ValueError, NotImplementedError: If the model has no derivatives.
        """
        points, worker = np.unique(worker_nodes, return_inverse=True)
        groups = batch_size("x_sample", self.x)
        x = jax.tree.map(lambda leaf: jnp.asarray(leaf.reshape(-1, *leaf.shape[2:])), self.x)
        smoothing = jnp.asarray(self._smoothing)
        coded, slopes = jax.device_get(_encode_and_slope(self.data_nodes, points, smoothing, x, groups))

        # Workers at one node give one answer.
        def by_point(leaf):
            return np.concatenate([leaf[:, worker == i].sum(axis=1, keepdims=True) for i in range(len(points))], axis=1)

        by_coded = jax.tree.map(lambda leaf: by_point(leaf).reshape(-1, *leaf.shape[2:]), by_answers)
        by_inputs = self._model.pull_back(coded, by_coded)
        products = jax.tree.map(lambda a, b: np.sum(np.float64(a) * b), by_inputs, slopes)
        return float(sum(jax.tree.leaves(products)))

    def _groups_known(self, node):
        known = self._known.get(float(node))
        return 0 if known is None else jax.tree.leaves(known)[0].shape[0]

    def _compute(self, at, num_workers, start, stop):
        num_data, groups = len(self.data_nodes), stop - start
        # As many points as there are workers, however few are new: the same shapes, compiled once.
        points = np.pad(at, (0, num_workers - len(at)), mode="edge")
        encoder = spline_map(self.data_nodes, points, num_data * self._smoothing, np.ones(num_data))
        x = jax.tree.map(lambda leaf: jnp.asarray(leaf[start:stop].reshape(-1, *leaf.shape[2:])), self.x)
        coded = jax.device_get(apply_to_groups("x_sample", encoder, x, groups))
        new = (np.arange(groups)[:, None] * num_workers + np.arange(len(at))).ravel()
        answers = self._model(jax.tree.map(lambda leaf: leaf[new], coded))
        for i, node in enumerate(at):
            of_node = jax.tree.map(lambda leaf, i=i: leaf[i :: len(at)], answers)
            if start:
                of_node = jax.tree.map(lambda *leaves: np.concatenate(leaves), self._known[float(node)], of_node)
            self._known[float(node)] = of_node


@functools.partial(jax.jit, static_argnums=4)
def _encode_and_slope(data_nodes, points, smoothing, x, groups):
    def encode(smoothing):
        num_data = data_nodes.shape[0]
        encoder = spline_map(data_nodes, points, num_data * smoothing, np.ones(num_data))
        return apply_to_groups("x_sample", encoder, x, groups)

    # Along the smoothing itself: by its logarithm.
    return jax.jvp(encode, (smoothing,), (smoothing,))


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How a code did.

    Attributes:
        code: The code.
        output: In which space it decoded.
        losses: For each straggler set and group.
        rmse: Root mean squared error norm.
    """

    code: SplineCode | ReplicationCode
    output: OutputSpace
    losses: Float[np.ndarray, "masks groups"]
    rmse: float

    @property
    def rank(self) -> tuple[float, float]:
        """By loss, then by error; what is not a number comes last."""
        loss = float(self.losses.mean())
        return (loss if np.isfinite(loss) else np.inf), (self.rmse if np.isfinite(self.rmse) else np.inf)

    def surely_better_than(self, other: "Measurement") -> bool:
        """Whether it loses less, by more than the standard error of the difference."""
        gained = other.losses - self.losses
        return bool(gained.mean() > standard_error(gained))


def standard_error(losses: Float[np.ndarray, "masks groups"]) -> float:
    """Of the mean, over straggler sets and over groups, each of which all of the other share."""
    masks, groups = losses.shape
    return float(np.sqrt(losses.mean(axis=0).var(ddof=1) / groups + losses.mean(axis=1).var(ddof=1) / masks))


class Judge:
    """Decodes answers under the same straggler sets for every code.

    Args:
        masks: Straggler sets, bool (masks, N).
        targets: The model's answers to all inputs, whose mean stands in for what is lost.
        loss: Of the results of one group.
        num_groups: The most groups there will be.
    """

    def __init__(self, masks: Bool[Array, "masks workers"], targets: PyTree[np.ndarray], loss: Loss, num_groups: int):
        self.masks, self._loss, self._num_groups = masks, loss, num_groups
        self._mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), targets)

    def __call__(
        self,
        code: SplineCode | ReplicationCode,
        outputs: Sequence[OutputSpace],
        answers: PyTree[np.ndarray],
        targets: PyTree[np.ndarray],
    ) -> list[Measurement]:
        """Measures a code in each space on groups of answers, leaves (groups, N, ...) and (groups, K, ...)."""
        groups = batch_size("answers", answers)
        # Under jit as they are known to the host: in double precision.
        with jax.enable_x64(True):
            matrices = _decoder_matrices(code, self.masks)
        matrices = np.asarray(matrices, np.float32)
        answers, targets = self._filled(answers, targets)
        measurements = []
        for output in outputs:
            found = _measure(matrices, answers, targets, self._mean, self._loss, output)
            losses, squares = (np.asarray(values, np.float64)[:, :groups] for values in found)
            measurements.append(Measurement(code, output, losses, float(np.sqrt(np.mean(squares)))))
        return measurements

    def slopes(
        self, code: SplineCode, output: OutputSpace, answers: PyTree[np.ndarray], targets: PyTree[np.ndarray]
    ) -> tuple[float, float, PyTree[np.ndarray]]:
        """The mean squared error, and its derivatives by the logarithm of the decoder's smoothing and by answers."""
        groups = batch_size("answers", answers)
        with jax.enable_x64(True):
            matrices = _decoder_matrices_and_slopes(code, np.asarray(code.decoder_smoothing, np.float64), self.masks)
        matrices, changes = (np.asarray(part, np.float32) for part in matrices)
        answers, targets = self._filled(answers, targets)
        square, (by_matrices, by_answers) = _square_and_slopes(
            matrices, answers, targets, self._mean, output, np.arange(self._num_groups) < groups
        )
        by_smoothing = np.sum(np.float64(by_matrices) * changes)
        return float(square), float(by_smoothing), jax.tree.map(lambda leaf: np.asarray(leaf)[:groups], by_answers)

    def _filled(self, *trees):
        """The same shapes for any number of groups, compiled once."""

        def filled(leaf):
            missing = self._num_groups - leaf.shape[0]
            return np.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")

        return jax.tree.map(filled, trees)


_decoder_matrices = jax.jit(jax.vmap(lambda code, returned: code.decoder_matrix(returned), (None, 0)))


@jax.jit
def _decoder_matrices_and_slopes(code, smoothing, masks):
    def matrices(smoothing):
        return jax.vmap(dataclasses.replace(code, decoder_smoothing=smoothing).decoder_matrix)(masks)

    return jax.jvp(matrices, (smoothing,), (smoothing,))


@functools.partial(jax.jit, static_argnums=4)
def _square_and_slopes(matrices, answers, targets, mean, output, counted):
    def square(matrices, answers):
        squares = _measure(matrices, answers, targets, mean, squared_error, output)[1]
        return jnp.mean(squares, where=counted)

    return jax.value_and_grad(square, (0, 1))(matrices, answers)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _measure(matrices, answers, targets, mean, loss, output):
    answers = output.of_answers(answers)

    def under(matrix):
        results = output.to_results(jax.tree.map(functools.partial(_decode, matrix), answers))
        filled = jax.tree.map(lambda leaf, instead: jnp.where(jnp.isnan(leaf), instead, leaf), results, mean)
        of_group = jax.vmap(loss)(results if loss is disagreement else filled, targets)
        return of_group, jax.vmap(squared_error)(filled, targets)

    # What derivatives need is computed again, set by set.
    return jax.lax.map(jax.checkpoint(under), matrices, batch_size=32)


def _decode(matrix, answers):
    return jnp.einsum("kn,gn...->gk...", matrix, answers, precision=jax.lax.Precision.HIGHEST)
