"""Computes workers' answers to the groups of a sample, once for all measurements."""

import functools
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._arrays import pad
from .._batched_model import BatchedModel
from ..allocation import Guesses, PriorPlanner
from ..checks import batch_size
from ..codes import AbstractCode
from ..codes.abstract import mixes_inputs
from ..linops import Dense, split
from ..pipeline import encode, flatten_groups, make_plans, unflatten_groups
from .smoothing import smoothing_of, with_smoothing

# Combinations of inputs count as equal if their coefficients agree to this many decimals, about float32's precision:
# coded inputs that differ by less get answers that differ by rounding.
_DECIMALS = 6


@final
class AnswerCache:
    """Computes workers' answers to the groups of a sample, once for each combination of inputs.

    What a worker computes is its row of the encoder's matrix applied to a group. Workers with equal rows, of one code
    or of several, give one answer; a row that is an input itself gives the model's answer to that input.

    Args:
        model: The model.
        x: The groups, leaves (K, groups, ...).
        targets: The model's answers to them, leaves (K, groups, ...).
    """

    def __init__(self, model: BatchedModel, x: PyTree[np.ndarray], targets: PyTree[np.ndarray]):
        self._model, self._x, self.targets = model, x, targets
        num_data = batch_size("x", x)
        # The answers of workers with this row to the first groups, leaves (groups, ...).
        self._answers_of_row: dict[bytes, PyTree[np.ndarray]] = {
            row.tobytes(): jax.tree.map(lambda leaf, k=k: leaf[k], targets)
            for k, row in enumerate(_round_rows(np.eye(num_data)))
        }

    def empty_copy(self) -> "AnswerCache":
        """Makes a cache of the same groups that holds nothing but the model's answers to the inputs themselves."""
        return AnswerCache(self._model, self._x, self.targets)

    def answers(self, code: AbstractCode, num_groups: int) -> PyTree[np.ndarray]:
        """Computes the answers of a code's workers to the first groups.

        Args:
            code: The code.
            num_groups: How many groups.

        Returns:
            Leaves (N, num_groups, ...).

        Raises:
            ValueError: If the code mixes inputs and these are no real numbers, or as for `BatchedModel`.
        """
        matrix = _encoder_matrix(code)
        rows = _round_rows(matrix)
        # One worker of each distinct row.
        _, representatives = np.unique(rows, axis=0, return_index=True)
        counts = np.array([self._num_cached_groups(rows[n]) for n in representatives])
        for start in np.unique(counts[counts < num_groups]):
            workers = representatives[counts == start]
            answers = self._compute(code, matrix, workers, int(start), num_groups)
            for i, n in enumerate(workers):
                self._append(rows[n], jax.tree.map(lambda leaf, i=i: leaf[i], answers))
        worker_answers = [
            jax.tree.map(lambda leaf: leaf[:num_groups], self._answers_of_row[row.tobytes()]) for row in rows
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *worker_answers)

    def encoder_slope(self, code: AbstractCode, cotangents: PyTree[np.ndarray]) -> float:
        """Computes the derivative of a number with respect to the logarithm of the encoder's smoothing.

        Args:
            code: A code whose encoder has a smoothing above zero.
            cotangents: Derivatives of the number with respect to the answers of all workers to all groups, leaves
                (N, groups, ...).

        Returns:
            The derivative.

        Raises:
            TypeError, ValueError, NotImplementedError: If the model has no derivatives.
        """
        with jax.enable_x64(True):
            matrix, slopes = jax.device_get(_matrix_and_slope(code, np.float64(smoothing_of(code, "encoder"))))
        rows = _round_rows(matrix)
        _, representatives, row_of_worker = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        row_of_worker = row_of_worker.reshape(-1)

        def sum_over_workers(leaf):
            """Sums the derivatives of workers with equal rows, which give one answer."""
            return np.stack([leaf[row_of_worker == i].sum(axis=0) for i in range(len(representatives))])

        x = jax.tree.map(jnp.asarray, self._x)
        coded, tangents = (
            flatten_groups(encode(code, Dense(split(entries[representatives].astype(np.float64))), x))
            for entries in (matrix, slopes)
        )
        answer_cotangents = flatten_groups(jax.tree.map(sum_over_workers, cotangents))
        input_cotangents = self._model.pull_back(jax.device_get(coded), answer_cotangents)
        products = jax.tree.map(lambda a, b: np.sum(np.float64(a) * b), input_cotangents, jax.device_get(tangents))
        return float(sum(jax.tree.leaves(products)))

    def _num_cached_groups(self, row: Float[np.ndarray, "data"]) -> int:
        answers = self._answers_of_row.get(row.tobytes())
        return 0 if answers is None else batch_size("answers", answers)

    def _append(self, row: Float[np.ndarray, "data"], answers: PyTree[np.ndarray]) -> None:
        key = row.tobytes()
        if key in self._answers_of_row:
            answers = jax.tree.map(lambda *leaves: np.concatenate(leaves), self._answers_of_row[key], answers)
        self._answers_of_row[key] = answers

    def _compute(
        self,
        code: AbstractCode,
        matrix: Float[np.ndarray, "workers data"],
        workers: Int[np.ndarray, "chosen"],
        start: int,
        stop: int,
    ) -> PyTree[np.ndarray]:
        """Runs the model on the coded inputs of some workers, leaves (chosen, stop - start, ...)."""
        # As many rows as the code has, however few are new: the same shapes, compiled once.
        encoder = Dense(split(np.asarray(pad(matrix[workers], code.num_workers), np.float64)))
        coded = encode(code, encoder, jax.tree.map(lambda leaf: jnp.asarray(leaf[:, start:stop]), self._x))
        coded = jax.tree.map(lambda leaf: leaf[: len(workers)], jax.device_get(coded))
        return unflatten_groups(self._model(flatten_groups(coded)), len(workers))


@final
class PlannedAnswers:
    """Computes the answers of a code whose workers' tasks are planned for each group, and holds the plans.

    Args:
        model: The model.
        code: A code that needs a plan.
        planner: Plans with a prior; None without one.
        x: The groups of whole batches, leaves (batches, K, groups, ...).
        targets: The model's answers to them, leaves (batches, K, groups, ...).
        guesses: The prior's guesses of these; None without a prior.

    Attributes:
        has_prior: Whether there is a planner.
        targets: As above.
        plans: Of all groups, leaves (batches, groups, ...).
    """

    def __init__(
        self,
        model: BatchedModel,
        code: AbstractCode,
        planner: PriorPlanner | None,
        x: PyTree[np.ndarray],
        targets: PyTree[np.ndarray],
        guesses: Guesses | None,
    ):
        self._model, self.targets, self.has_prior = model, targets, planner is not None
        self._code, self._mixes = code, mixes_inputs(code)
        self._coded, self.plans = jax.device_get(_encode_batches(code, planner, x, guesses, self._mixes))

    def answers(self) -> PyTree[np.ndarray]:
        """Computes the workers' answers, leaves (batches, N, groups, ...)."""
        if not self._mixes:
            # The model has answered the inputs themselves.
            return jax.device_get(_copy_answers(self._code, self.targets, self.plans))
        num_batches, num_workers, num_groups = jax.tree.leaves(self._coded)[0].shape[:3]
        rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), self._coded)
        return jax.tree.map(
            lambda leaf: leaf.reshape(num_batches, num_workers, num_groups, *leaf.shape[1:]), self._model(rows)
        )


@functools.partial(jax.jit, static_argnums=4)
def _encode_batches(code, planner, x, guesses, encodes):
    """Encodes the groups of several batches, unless workers compute copies, and plans them."""

    def encode_batch(batch):
        x, guesses = batch
        if planner is None:
            plans = make_plans(code, None, x)
        else:
            plans = jax.vmap(functools.partial(planner.plan, code), in_axes=1)(x, guesses)
        return encode(code, None, x, plans) if encodes else None, plans

    return jax.lax.map(encode_batch, (x, guesses))


@jax.jit
def _copy_answers(code, targets, plans):
    """Gives workers of several batches the answers to the inputs that they compute."""
    return jax.lax.map(lambda batch: encode(code, None, *batch), (targets, plans))


def _encoder_matrix(code: AbstractCode) -> Float[np.ndarray, "workers data"]:
    with jax.enable_x64(True):
        return np.asarray(code.encoder_matrix())


@jax.jit
def _matrix_and_slope(code, smoothing: Float[Array, ""]):
    """Computes the encoder's matrix and its derivative with respect to the logarithm of the smoothing."""

    def matrix(smoothing):
        return with_smoothing(code, encoder=smoothing).encoder_matrix()

    return jax.jvp(matrix, (smoothing,), (smoothing,))


def _round_rows(matrix: Float[np.ndarray, "rows data"]) -> Float[np.ndarray, "rows data"]:
    """Rounds rows so that those of equal workers are equal bit for bit, zeros of both signs too."""
    return np.round(matrix, _DECIMALS).astype(np.float32) + np.float32(0)
