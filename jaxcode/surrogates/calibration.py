"""Calibrates what a guess is expected to cost: a monotone map from a score to the mean loss of guesses with it."""

from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from scipy import optimize

from .._pytree import pytree

DISAGREEMENT = "disagreement"
SQUARED_ERROR = "squared_error"

# Guesses in a bin: fewer follow the noise of single guesses, more are too coarse where the loss changes fast.
_BIN = 25
_MAX_BINS = 64
# How many guesses the parametric curve counts as, in each bin.
_PARAMETRIC_WEIGHT = 1.0


@final
@pytree("is_logarithm", eq=False)
class Calibration:
    """Maps scores to expected losses, linearly between knots.

    Attributes:
        scores: Ascending, (knots,).
        losses: Expected losses at them, ascending, (knots,).
        is_logarithm: Whether scores are logarithms of losses, but for an offset. Then so are losses above the last
            knot, up to a hundred times its own; if not, they are constant there.
    """

    scores: Float[Array | np.ndarray, "knots"]
    losses: Float[Array | np.ndarray, "knots"]
    is_logarithm: bool

    def __call__(self, scores: Float[ArrayLike, "*batch"]) -> Float[Array, "*batch"]:
        """Returns the expected losses of guesses with these scores."""
        knots, losses = jnp.asarray(self.scores), jnp.asarray(self.losses)
        scores = jnp.asarray(scores, knots.dtype)
        expected = jnp.interp(scores, knots, losses)
        if self.is_logarithm:
            expected = expected * jnp.exp(jnp.clip(scores - knots[-1], 0, np.float32(np.log(100))))
        return expected


def margins(rows: Float[ArrayLike, "*batch classes"]) -> Float[Array, "*batch"]:
    """Computes how far the largest of the class scores is above the second largest."""
    top = jax.lax.top_k(jnp.asarray(rows), 2)[0]
    return top[..., 0] - top[..., 1]


def calibrate_disagreement(
    guesses: Float[np.ndarray, "batch classes"], answers: Float[np.ndarray, "batch classes"]
) -> Calibration:
    """Fits the probability that a guess names another class than the answer, by the guess's margin.

    The score is the negative margin.
    """
    scores = -np.asarray(margins(guesses), np.float64)
    wrong = np.float64(np.argmax(guesses, axis=1) != np.argmax(answers, axis=1))
    return Calibration(*_fit(scores, wrong, _fit_logistic(scores, wrong)), is_logarithm=False)


def calibrate_squared_error(
    log_errors: Float[np.ndarray, "batch"], squared_errors: Float[np.ndarray, "batch"]
) -> Calibration:
    """Fits the mean squared error of guesses by its predicted logarithm, the score."""
    scores, squared_errors = (np.asarray(values, np.float64) for values in (log_errors, squared_errors))
    ratio = np.exp(np.clip(scores - scores.mean(), -30, 30))
    parametric = ratio * squared_errors.mean() / ratio.mean()
    return Calibration(*_fit(scores, squared_errors, parametric), is_logarithm=True)


def _fit(scores, losses, parametric) -> tuple[np.ndarray, np.ndarray]:
    """Averages losses in bins of equal counts, shrinks the means to a parametric curve and makes them monotone.

    Returns:
        The bins' mean scores and losses, as knots of which there are always 64, so that programs that read them need
        not compile again. Those added below the lowest score have its loss, which is expected there anyway.
    """
    order = np.argsort(scores, kind="stable")
    bins = np.array_split(order, int(np.clip(len(order) // _BIN, 1, _MAX_BINS)))

    def bin_means(values):
        return np.array([values[members].mean() for members in bins])

    counts = np.array([len(members) for members in bins], np.float64)
    means = (counts * bin_means(losses) + _PARAMETRIC_WEIGHT * bin_means(parametric)) / (counts + _PARAMETRIC_WEIGHT)
    monotone = optimize.isotonic_regression(means, weights=counts).x
    knots = bin_means(scores)
    num_added = _MAX_BINS - len(knots)
    below = knots[0] - 1e-3 * max(1.0, abs(knots[0])) * np.arange(num_added, 0, -1)
    losses = np.pad(monotone, (num_added, 0), mode="edge")
    return np.concatenate([below, knots]).astype(np.float32), losses.astype(np.float32)


def _fit_logistic(scores, wrong):
    """Returns the probabilities of a logistic regression of wrong guesses on the score, with pseudo-counts of Platt's.

    References:
        Platt, Probabilistic outputs for support vector machines (1999).
    """
    num_wrong = wrong.sum()
    targets = np.where(wrong > 0, (num_wrong + 1) / (num_wrong + 2), 1 / (len(wrong) - num_wrong + 2))
    scale = scores.std() or 1.0
    standard = (scores - scores.mean()) / scale

    def loss_and_slopes(coefficients):
        exponent = coefficients[0] + coefficients[1] * standard
        residual = 1 / (1 + np.exp(-np.clip(exponent, -500, 500))) - targets
        loss = np.logaddexp(0, exponent) - targets * exponent
        return loss.mean(), np.array([residual.mean(), (residual * standard).mean()])

    intercept, slope = optimize.minimize(loss_and_slopes, np.zeros(2), jac=True, method="BFGS").x
    return 1 / (1 + np.exp(-np.clip(intercept + slope * standard, -500, 500)))
