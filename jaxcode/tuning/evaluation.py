"""Measures codes: decodes answers under many straggler sets and compares results with the model's own answers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..codes import AbstractCode, Plan, Prior, ReplicationCode
from ..linops import Dense, DoubleSingle
from ..outputs import OutputSpace, as_returned
from ..pipeline import decode
from .losses import Loss, disagreement, squared_error
from .smoothing import smoothing_of, with_smoothing

# Straggler sets that are decoded together: more at a time take more memory, fewer do not fill the processor.
_MASKS_IN_A_BATCH = 32
# The same where a decoder is prepared for each, of which one of hundreds of workers fills the processor.
_PLANNED_MASKS_IN_A_BATCH = 4
# Codes that are fitted to the answers under each straggler set, which takes as long as decoding dozens, are measured
# under so many sets, in total over groups, and so few and many of them.
_PLANNED_CASES = 1500
_PLANNED_MASKS = 16, 64
# Those that are fitted beforehand only solve for the inputs of a batch, in time proportional to the cube of these.
_FITTED_CUBES = 5e9


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """Holds the losses of a code in one output space.

    Attributes:
        code: The code.
        output: The space in which answers are decoded.
        losses: The loss under each straggler set, of each group.
        rmse: Root mean squared error norm.
    """

    code: AbstractCode
    output: OutputSpace
    losses: Float[np.ndarray, "masks groups"]
    rmse: float

    @property
    def num_groups(self) -> int:
        """How many groups were measured."""
        return self.losses.shape[1]

    @property
    def rank(self) -> tuple[float, float]:
        """What measurements are sorted by: the mean loss, then the error; those that are not finite come last."""
        loss = float(self.losses.mean())
        return (loss if np.isfinite(loss) else np.inf), (self.rmse if np.isfinite(self.rmse) else np.inf)

    def improves_on(self, other: "Measurement") -> bool:
        """Returns whether the mean loss is smaller than another's by more than the standard error of their difference.

        Both must have been measured under the same straggler sets, on as many groups; if one was measured under fewer
        sets, those are compared.
        """
        if not np.isfinite(other.rank[0]) or not np.isfinite(self.rank[0]):
            return self.rank[0] < other.rank[0]
        gain = self._gain(other)
        return bool(gain.mean() > standard_error(gain))

    def is_better(self, other: "Measurement") -> bool:
        """Returns whether it is ranked before another under the straggler sets of both."""
        if len(self.losses) == len(other.losses) or not np.isfinite([self.rank[0], other.rank[0]]).all():
            return self.rank < other.rank
        return bool(self._gain(other).mean() > 0)

    def _gain(self, other):
        num_masks = min(len(self.losses), len(other.losses))
        return other.losses[:num_masks] - self.losses[:num_masks]


def standard_error(values: Float[np.ndarray, "masks groups"]) -> float:
    """Estimates the standard error of the mean over straggler sets and groups, every set crossed with every group.

    NaN where values are infinite.
    """
    masks, groups = values.shape
    if not np.isfinite(values).all():
        return np.nan
    return float(np.sqrt(values.mean(axis=0).var(ddof=1) / groups + values.mean(axis=1).var(ddof=1) / masks))


@final
class Evaluator:
    """Decodes answers under the same straggler sets for every code.

    Args:
        masks: Which workers return in each straggler set, bool (masks, N).
        loss: The loss of one group.
        num_groups: The largest number of groups that a code is measured on.
    """

    def __init__(self, masks: Bool[Array, "masks workers"], loss: Loss, num_groups: int):
        self.masks, self._loss, self._num_groups = masks, loss, num_groups

    def measure(
        self,
        code: AbstractCode,
        outputs: Sequence[OutputSpace],
        answers: PyTree[np.ndarray],
        targets: PyTree[np.ndarray],
        guesses: Prior | None = None,
    ) -> list[Measurement]:
        """Measures a code in several output spaces.

        Args:
            code: The code.
            outputs: The spaces.
            answers: Its workers' answers to some groups, leaves (N, groups, ...).
            targets: The model's own answers to their inputs, leaves (K, groups, ...).
            guesses: A surrogate's guesses of both; None to decode without a prior.

        Returns:
            A measurement for each space.
        """
        num_groups = jax.tree.leaves(answers)[0].shape[1]
        with jax.enable_x64(True):
            decoders, recovered = jax.device_get(_prepare(code, self.masks))
        answers, targets, guesses = self._pad_groups(answers, targets, guesses)
        measurements = []
        for output in outputs:
            values = _measure(code, decoders, recovered, answers, targets, guesses, self._loss, output)
            measurements.append(_measurement(code, output, values, num_groups))
        return measurements

    def measure_copies(
        self,
        code: ReplicationCode,
        assignments: Int[np.ndarray, "groups workers"],
        targets: PyTree[np.ndarray],
        guesses: PyTree[np.ndarray],
    ) -> Measurement:
        """Measures replication whose copies are placed anew in each group, with a prior.

        Args:
            code: The code.
            assignments: Which input each worker computes.
            targets: As for `measure`.
            guesses: A surrogate's guesses of them, leaves (K, groups, ...).

        Returns:
            The measurement, in the space of what the model returns.
        """
        num_groups = len(assignments)
        targets, guesses, assignments = self._pad_groups(targets, guesses, assignments.T)
        values = _measure_copies(code, self.masks, assignments.T, targets, guesses, self._loss)
        return _measurement(code, as_returned, values, num_groups)

    def measure_planned(
        self,
        code: AbstractCode,
        outputs: Sequence[OutputSpace],
        plans: PyTree[np.ndarray],
        answers: PyTree[np.ndarray],
        targets: PyTree[np.ndarray],
    ) -> list[Measurement]:
        """Measures a code whose groups have plans, and whose batches are decoded together, in several output spaces.

        Args:
            code: The code.
            outputs: The spaces.
            plans: Of each group, leaves (batches, groups, ...).
            answers: Its workers' answers, leaves (batches, N, groups, ...).
            targets: As for `measure`, leaves (batches, K, groups, ...).

        Returns:
            A measurement for each space.
        """
        if getattr(code, "process", None) is None:
            num_masks = int(np.clip(_PLANNED_CASES // self._num_groups, *_PLANNED_MASKS))
        else:
            num_batches, num_data, num_groups = jax.tree.leaves(targets)[0].shape[:3]
            num_masks = max(_PLANNED_MASKS[0], int(_FITTED_CUBES / (num_batches * (num_data * num_groups) ** 3)))
        measurements = []
        for output in outputs:
            values = _measure_planned(code, self.masks[:num_masks], plans, answers, targets, self._loss, output)
            measurements.append(_measurement(code, output, values, self._num_groups))
        return measurements

    def squared_error_slopes(
        self,
        code: AbstractCode,
        output: OutputSpace,
        answers: PyTree[np.ndarray],
        targets: PyTree[np.ndarray],
        guesses: Prior | None = None,
    ) -> tuple[float, float, PyTree[np.ndarray]]:
        """Differentiates the mean squared error.

        Args:
            code: A code whose decoder has a smoothing; the derivative is of use only where that is above zero.
            output: As for `measure`, with one space.
            answers: As for `measure`.
            targets: As for `measure`.
            guesses: As for `measure`.

        Returns:
            The mean squared error; its derivative with respect to the logarithm of the decoder's smoothing; and its
            derivatives with respect to the answers, leaves (N, groups, ...).
        """
        num_groups = jax.tree.leaves(answers)[0].shape[1]
        with jax.enable_x64(True):
            smoothing = np.float64(smoothing_of(code, "decoder"))
            decoders, slopes, recovered = jax.device_get(_prepare_with_slopes(code, smoothing, self.masks))
        answers, targets, guesses = self._pad_groups(answers, targets, guesses)
        is_measured = np.arange(self._num_groups) < num_groups
        square, (matrix_slopes, answer_slopes) = _square_and_slopes(
            code, decoders, recovered, answers, targets, guesses, output, is_measured
        )
        smoothing_slope = np.sum(np.float64(matrix_slopes) * slopes)
        answer_slopes = jax.tree.map(lambda leaf: np.asarray(leaf)[:, :num_groups], answer_slopes)
        return float(square), float(smoothing_slope), answer_slopes

    def _pad_groups(self, *trees: PyTree[Any]) -> tuple[PyTree[Any], ...]:
        """Pads groups to the same number for all measurements, which are then compiled once."""

        def pad_groups(leaf):
            return leaf[:, np.minimum(np.arange(self._num_groups), leaf.shape[1] - 1)]

        return jax.tree.map(pad_groups, trees)


@jax.jit
def _prepare(code, masks):
    """Prepares the decoder of each straggler set, and which inputs it recovers, (masks, K)."""

    def prepare(returned):
        linop = code.decoder_linop(returned)
        # Columns of absent workers are zero in the matrix, so that their answers need not be masked in each set.
        return _dense(linop.matrix()) if linop.mixes else linop

    return jax.vmap(prepare)(masks), jax.vmap(code.recovered)(masks)


@jax.jit
def _prepare_with_slopes(code, smoothing, masks):
    """Prepares the decoders' matrices, (masks, K, N), and their derivatives by the logarithm of the smoothing."""

    def matrices(smoothing):
        return jax.vmap(with_smoothing(code, decoder=smoothing).decoder_matrix)(masks)

    return *jax.jvp(matrices, (smoothing,), (smoothing,)), jax.vmap(code.recovered)(masks)


def _dense(matrix):
    return Dense(DoubleSingle(matrix, None))


def _measurement(code, output, values, num_groups):
    """Makes a measurement of losses and squared errors, (masks, padded groups); what is lost is infinitely far off."""
    values = (np.asarray(value, np.float64)[:, :num_groups] for value in values)
    losses, squares = (np.where(np.isnan(value), np.inf, value) for value in values)
    return Measurement(code, output, losses, float(np.sqrt(np.mean(squares))))


@functools.partial(jax.jit, static_argnums=6)
def _square_and_slopes(code, matrices, recovered, answers, targets, guesses, output, is_measured):
    def square(matrices, answers):
        _, squares = _measure(code, _dense(matrices), recovered, answers, targets, guesses, squared_error, output)
        return jnp.mean(squares, where=is_measured)

    return jax.value_and_grad(square, (0, 1))(matrices, answers)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _measure(code, decoders, recovered, answers, targets, guesses, loss, output):
    """Computes losses and squared errors, each (masks, groups)."""
    answers = output.transform(answers)
    if guesses is not None:
        guesses = Prior(output.transform(guesses.workers), output.transform(guesses.data))

    def measure(decoder_and_recovered):
        decoder, recovered = decoder_and_recovered
        if guesses is None:
            results = decode(code, decoder, answers, as_returned)
            return _losses(output.inverse_transform(results), recovered, targets, loss)
        residuals = guesses.residuals(answers) if decoder.mixes else answers
        decoded = decode(code, decoder, residuals, as_returned)
        results = output.inverse_transform(guesses.complete(decoded, recovered, adds=decoder.mixes))
        return _losses(results, jnp.ones_like(recovered), targets, loss)

    # Derivatives recompute the results of each set instead of storing them.
    return jax.lax.map(jax.checkpoint(measure), (decoders, recovered), batch_size=_MASKS_IN_A_BATCH)


@functools.partial(jax.jit, static_argnums=5)
def _measure_copies(code, masks, assignments, targets, guesses, loss):
    """Computes losses and squared errors, each (masks, groups)."""

    def measure(returned):
        recovered = jax.vmap(lambda assignment: code.recovered(returned, Plan(assignment=assignment)))(assignments)
        results = Prior(guesses, guesses).complete(targets, recovered.T, adds=False)
        return _losses(results, jnp.ones(code.num_data, bool), targets, loss)

    return jax.lax.map(measure, masks, batch_size=_MASKS_IN_A_BATCH)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _measure_planned(code, masks, plans, answers, targets, loss, output):
    """Computes losses and squared errors, each (masks, groups of all batches)."""

    def measure_batch(batch):
        plans, answers, targets = batch

        def measure(returned):
            results = decode(code, None, answers, output, returned, plans)
            return _losses(results, code.recovered(returned), targets, loss)

        return jax.lax.map(measure, masks, batch_size=_PLANNED_MASKS_IN_A_BATCH)

    values = jax.lax.map(measure_batch, (plans, answers, targets))
    return tuple(jnp.moveaxis(value, 0, 1).reshape(len(masks), -1) for value in values)


def _losses(results, recovered, targets, loss):
    """Computes the loss and the squared error of each group, (groups,), from results, leaves (K, groups, ...)."""

    def mark_lost(result):
        # Integers have no NaN: they are replaced by floating-point numbers, for scores those of the same class.
        if not jnp.issubdtype(result.dtype, jnp.inexact):
            is_scores = loss is disagreement
            result = jax.nn.one_hot(jnp.argmax(result, -1), result.shape[-1]) if is_scores else result.astype(float)
        return jnp.where(recovered.reshape(-1, *[1] * (result.ndim - 1)), result, jnp.nan)

    marked = jax.tree.map(mark_lost, results)
    return jax.vmap(loss, in_axes=1)(marked, targets), jax.vmap(squared_error, in_axes=1)(marked, targets)
