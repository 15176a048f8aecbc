"""Summarises errors of trials: means, their intervals, and slopes."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

FUNCTIONS = ("x sin x", "|x - x_k|^1.6")
_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Curve:
    """Holds the errors of one scheme on one function.

    Attributes:
        statement: Which statement they belong to, a key of `rate_results.STATEMENTS`.
        function: What workers compute.
        scheme: The code, with the attack where there is one.
        x: The number of workers or of stragglers, shape (points,).
        mean: Mean squared errors over trials, shape (points,).
        low: Lower ends of the means' 95 % intervals, from a bootstrap over trials.
        high: Upper ends.
        median: Medians of the trials' squared errors.
        slope: Of log mean against log x by least squares, and the ends of its 95 % interval from the same bootstrap:
            chance of the trials only, not that the slope changes along the curve. None where there is no rate.
        bound: The slope that the statement proves or that the scheme is compared with.
        trials: Sets of inputs and stragglers at each point.
        seed: The seed that they were drawn with.
    """

    statement: str
    function: str
    scheme: str
    x: Float[np.ndarray, "points"]
    mean: Float[np.ndarray, "points"]
    low: Float[np.ndarray, "points"]
    high: Float[np.ndarray, "points"]
    median: Float[np.ndarray, "points"]
    slope: tuple[float, float, float] | None
    bound: float | None
    trials: int
    seed: int


def summarise(
    statement: str,
    samples: dict[str, list[np.ndarray]],
    x: Sequence[int],
    bound: float | None,
    seed: int,
    factor: np.ndarray | None = None,
    functions: Sequence[str] = FUNCTIONS,
) -> list[Curve]:
    """Computes the curves of all schemes and functions.

    Args:
        statement: The statement's name.
        samples: Of each scheme and point, squared errors of shape (trials, functions).
        x: The points.
        bound: The slope that is proved; None where there is no rate.
        seed: For the bootstrap, and recorded.
        factor: What means are divided by before slopes are fitted, shape (points,).
        functions: The functions' names.

    Returns:
        One curve for each scheme and function.
    """
    rng = np.random.default_rng(seed)
    positions = np.asarray(x, float)

    def slope(means):
        logs = np.log(means / (1 if factor is None else factor))
        centred = np.log(positions) - np.log(positions).mean()
        return logs @ centred / (centred @ centred)

    curves = []
    for scheme, points in samples.items():
        for i, function in enumerate(functions):
            errors = [point[:, i] for point in points]
            mean = np.array([point.mean() for point in errors])
            # Resampled means, (resamples, points).
            means = np.stack([_resampled_means(point, rng) for point in errors], axis=1)
            low, high = np.quantile(means, (0.025, 0.975), axis=0)
            fit = None
            if bound is not None:
                start, end = np.quantile(slope(means), (0.025, 0.975))
                fit = float(slope(mean)), float(start), float(end)
            median = np.array([np.median(point) for point in errors])
            curves.append(
                Curve(statement, function, scheme, positions, mean, low, high, median, fit, bound, len(points[0]), seed)
            )
    return curves


def _resampled_means(errors, rng):
    """Computes means of trials drawn with replacement, (resamples,)."""
    counts = rng.multinomial(len(errors), np.full(len(errors), 1 / len(errors)), size=_RESAMPLES)
    return counts @ errors / len(errors)
