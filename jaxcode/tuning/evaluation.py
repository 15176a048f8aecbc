"""Measures codes: decodes answers under many straggler sets and compares results with the model's own answers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from ..codes import AbstractCode
from ..linops import Dense, DoubleSingle
from ..outputs import OutputSpace
from ..pipeline import decode
from .losses import Loss, disagreement, squared_error
from .smoothing import smoothing_of, with_smoothing

# Straggler sets that are decoded together: more at a time take more memory, fewer do not fill the processor.
_MASKS_IN_A_BATCH = 32


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

        Both must have been measured under the same straggler sets, on as many groups.
        """
        gain = other.losses - self.losses
        return bool(gain.mean() > standard_error(gain))


def standard_error(values: Float[np.ndarray, "masks groups"]) -> float:
    """Estimates the standard error of the mean over straggler sets and groups, every set crossed with every group."""
    masks, groups = values.shape
    return float(np.sqrt(values.mean(axis=0).var(ddof=1) / groups + values.mean(axis=1).var(ddof=1) / masks))


@final
class Evaluator:
    """Decodes answers under the same straggler sets for every code.

    Args:
        masks: Which workers return in each straggler set, bool (masks, N).
        targets: The model's answers to the whole sample, leaves (B, ...), whose mean stands in for lost results.
        loss: The loss of one group.
        num_groups: The largest number of groups that a code is measured on.
    """

    def __init__(self, masks: Bool[Array, "masks workers"], targets: PyTree[np.ndarray], loss: Loss, num_groups: int):
        self.masks, self._loss, self._num_groups = masks, loss, num_groups
        self._mean = jax.tree.map(lambda leaf: np.mean(leaf, axis=0, dtype=np.float64).astype(leaf.dtype), targets)

    def measure(
        self,
        code: AbstractCode,
        outputs: Sequence[OutputSpace],
        answers: PyTree[np.ndarray],
        targets: PyTree[np.ndarray],
    ) -> list[Measurement]:
        """Measures a code in several output spaces.

        Args:
            code: The code.
            outputs: The spaces.
            answers: Its workers' answers to some groups, leaves (N, groups, ...).
            targets: The model's own answers to their inputs, leaves (K, groups, ...).

        Returns:
            A measurement for each space.
        """
        num_groups = jax.tree.leaves(answers)[0].shape[1]
        with jax.enable_x64(True):
            decoders, recovered = jax.device_get(_prepare(code, self.masks))
        answers, targets = self._pad_groups(answers, targets)
        measurements = []
        for output in outputs:
            values = _measure(code, decoders, recovered, answers, targets, self._mean, self._loss, output)
            losses, squares = (np.asarray(value, np.float64)[:, :num_groups] for value in values)
            measurements.append(Measurement(code, output, losses, float(np.sqrt(np.mean(squares)))))
        return measurements

    def squared_error_slopes(
        self, code: AbstractCode, output: OutputSpace, answers: PyTree[np.ndarray], targets: PyTree[np.ndarray]
    ) -> tuple[float, float, PyTree[np.ndarray]]:
        """Differentiates the mean squared error.

        Args:
            code: A code whose decoder has a smoothing; the derivative is of use only where that is above zero.
            output: As for `measure`, with one space.
            answers: As for `measure`.
            targets: As for `measure`.

        Returns:
            The mean squared error; its derivative with respect to the logarithm of the decoder's smoothing; and its
            derivatives with respect to the answers, leaves (N, groups, ...).
        """
        num_groups = jax.tree.leaves(answers)[0].shape[1]
        with jax.enable_x64(True):
            smoothing = np.float64(smoothing_of(code, "decoder"))
            decoders, slopes, recovered = jax.device_get(_prepare_with_slopes(code, smoothing, self.masks))
        answers, targets = self._pad_groups(answers, targets)
        square, (matrix_slopes, answer_slopes) = _square_and_slopes(
            code, decoders, recovered, answers, targets, self._mean, output, np.arange(self._num_groups) < num_groups
        )
        smoothing_slope = np.sum(np.float64(matrix_slopes) * slopes)
        answer_slopes = jax.tree.map(lambda leaf: np.asarray(leaf)[:, :num_groups], answer_slopes)
        return float(square), float(smoothing_slope), answer_slopes

    def _pad_groups(self, *trees: PyTree[np.ndarray]) -> tuple[PyTree[np.ndarray], ...]:
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


@functools.partial(jax.jit, static_argnums=6)
def _square_and_slopes(code, matrices, recovered, answers, targets, mean, output, is_measured):
    def square(matrices, answers):
        _, squares = _measure(code, _dense(matrices), recovered, answers, targets, mean, squared_error, output)
        return jnp.mean(squares, where=is_measured)

    return jax.value_and_grad(square, (0, 1))(matrices, answers)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _measure(code, decoders, recovered, answers, targets, mean, loss, output):
    """Computes losses and squared errors, each (masks, groups)."""

    def measure(decoder_and_recovered):
        decoder, recovered = decoder_and_recovered
        results = decode(code, decoder, answers, output)

        def fill_lost(result, mean):
            is_lost = ~recovered.reshape(-1, *[1] * (result.ndim - 1))
            if jnp.issubdtype(result.dtype, jnp.inexact):
                is_lost = is_lost | jnp.isnan(result)
            return jnp.where(is_lost, jnp.broadcast_to(mean, result.shape), result)

        def mark_lost(scores):
            # Integers have no NaN: they are replaced by floating scores of the same class, which have.
            if not jnp.issubdtype(scores.dtype, jnp.inexact):
                scores = jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])
            return jnp.where(recovered.reshape(-1, *[1] * (scores.ndim - 1)), scores, jnp.nan)

        filled = jax.tree.map(fill_lost, results, mean)
        # Disagreement is given NaN for a lost input, which agrees with no class.
        marked_or_filled = jax.tree.map(mark_lost, results) if loss is disagreement else filled
        losses = jax.vmap(loss, in_axes=1)(marked_or_filled, targets)
        return losses, jax.vmap(squared_error, in_axes=1)(filled, targets)

    # Derivatives recompute the results of each set instead of storing them.
    return jax.lax.map(jax.checkpoint(measure), (decoders, recovered), batch_size=_MASKS_IN_A_BATCH)
