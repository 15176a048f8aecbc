"""Ranks candidates by successive halving, then tunes the smoothings of the best."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import final

import jax
import numpy as np
from jaxtyping import Int
from scipy import optimize
from tqdm import tqdm

from ..codes import AbstractCode, Prior, ReplicationCode
from ..codes.abstract import mixes_inputs
from ..functions import NO_DERIVATIVES
from ..outputs import OutputSpace
from .answers import AnswerCache, PlannedAnswers
from .evaluation import Evaluator, Measurement
from .smoothing import smoothing_of, with_smoothing

# Smoothings that are tried, in units of K^-4: at one unit a curve through K data begins to miss each of them. The
# gradient moves a smoothing tenfold at most, which bridges the steps.
_SMOOTHINGS = (0.01, 0.1, 1.0, 10.0)
# How many of the best are tried with smoothing; the best of them also with smoothing of the encoder. More take longer,
# fewer may leave out the one that gains most from smoothing.
_NUM_FINALISTS = 3


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Option:
    """Holds a layout and an order of the batch, with or without a prior, to be measured.

    Attributes:
        layout: The layout's name.
        order: The order's name.
        code: The code.
        cache: Workers' answers to the sample in that order.
        guesses: The prior's guesses of these answers; None without a prior.
        assignments: Which input each worker computes in each group, (groups, N), where copies are placed by the risk of
            guesses; None for the code's own assignment.
        planned: Answers and plans of a code that needs plans, instead of the caches; None for others.
        places_copies: Whether copies are placed by the risk of guesses.
        output: The only space to measure it in; None for all.
    """

    layout: str
    order: str
    code: AbstractCode
    cache: AnswerCache | None
    guesses: AnswerCache | None = None
    assignments: Int[np.ndarray, "groups workers"] | None = None
    planned: PlannedAnswers | None = None
    places_copies: bool = False
    output: OutputSpace | None = None

    @property
    def has_prior(self) -> bool:
        """Whether answers are decoded with a prior."""
        return self.guesses is not None if self.planned is None else self.planned.has_prior

    @property
    def copies_only(self) -> bool:
        """Whether workers compute inputs as they are, as those of replication do."""
        return not mixes_inputs(self.code)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """Holds an option and its measurement in the best of the output spaces.

    Attributes:
        option: The option.
        measurement: Its measurement.
    """

    option: Option
    measurement: Measurement

    @property
    def rank(self) -> tuple[float, float]:
        """What trials are sorted by."""
        return self.measurement.rank


def measure(evaluator: Evaluator, option: Option, outputs: Sequence[OutputSpace], num_groups: int) -> Trial:
    """Measures an option on the first groups, in the best of some output spaces; one with plans on all groups.

    Its batches are decoded as a whole, and few groups would take as long as all.
    """
    outputs = outputs if option.output is None else [option.output]
    if option.planned is not None:
        planned = option.planned
        measurements = evaluator.measure_planned(
            option.code, outputs, planned.plans, planned.answers(), planned.targets
        )
    elif option.assignments is not None:
        assert option.cache is not None
        assert isinstance(option.code, ReplicationCode)
        assert option.guesses is not None
        targets, guesses = (
            jax.tree.map(lambda leaf: leaf[:, :num_groups], cache.targets) for cache in (option.cache, option.guesses)
        )
        assignments = option.assignments[:num_groups]
        measurements = [evaluator.measure_copies(option.code, assignments, targets, guesses)]
    else:
        measurements = evaluator.measure(option.code, outputs, *_answers_and_targets(option, num_groups))
    return Trial(option, min(measurements, key=lambda measurement: measurement.rank))


def select(
    evaluator: Evaluator,
    options: Sequence[Option],
    outputs: Sequence[OutputSpace],
    num_groups: int,
    deadline: float,
    progress: bool,
) -> list[Trial]:
    """Ranks options by successive halving and tunes the smoothings of the best.

    Args:
        evaluator: Measures them.
        options: At least one.
        outputs: Output spaces to choose from.
        num_groups: Groups of inputs in the sample.
        deadline: When to stop, by `time.monotonic`: what has not been measured by then is left out, or keeps its last
            measurement. The first option, and all that only copy inputs, are always measured.
        progress: Whether to show a progress bar on standard error.

    Returns:
        The trials from best to worst: those measured on all groups, then the dropped ones, the last of them first.

    References:
        Karnin, Koren and Somekh, Almost optimal exploration in multi-armed bandits, ICML 2013.
    """
    counts = sorted({max(2, -(-num_groups // divisor)) for divisor in (4, 2, 1)})
    dropped: list[Trial] = []
    with tqdm(desc="tuning", unit="candidate", total=0, disable=not progress) as bar:

        def advance(trials_or_options, step, is_essential=lambda item: False):
            """Takes a step of each while there is time; returns what came of them, and the others as they were."""
            bar.total += len(trials_or_options)
            trials, left_out = [], []
            for item in trials_or_options:
                if is_essential(item) or time.monotonic() < deadline:
                    trials.append(step(item))
                else:
                    left_out.append(item)
                bar.update()
            return trials, left_out

        trials, _ = advance(
            options,
            lambda option: measure(evaluator, option, outputs, counts[0]),
            lambda option: option is options[0] or option.copies_only,
        )
        for count in counts[1:]:
            survivors, losers = _halve(trials)
            trials, left_out = advance(
                survivors,
                functools.partial(_measure_again, evaluator, num_groups=count),
                lambda trial: trial is survivors[0] or trial.option.copies_only,  # noqa: B023, called at once
            )
            dropped = left_out + losers + dropped
        trials.sort(key=lambda trial: trial.rank)
        smoothable = [trial for trial in trials if smoothing_of(trial.option.code, "decoder") is not None]
        finalists = smoothable[:_NUM_FINALISTS]
        others = [trial for trial in trials if trial not in finalists]
        smoothed, unsmoothed = advance(finalists, functools.partial(smooth_decoder, evaluator))
        finalists = sorted(smoothed + unsmoothed, key=lambda trial: trial.rank)
        if time.monotonic() < deadline:
            finalists[:1] = [smooth_encoder(evaluator, trial) for trial in finalists[:1]]
    return sorted(finalists + others, key=lambda trial: trial.rank) + dropped


def merge(rankings: Sequence[Sequence[Trial]], num_groups: int) -> list[Trial]:
    """Merges rankings that `select` returned: those measured on all groups by rank, then the dropped ones."""
    trials = [trial for ranking in rankings for trial in ranking]
    complete = [trial for trial in trials if trial.measurement.num_groups == num_groups]
    dropped = [trial for trial in trials if trial.measurement.num_groups < num_groups]
    return sorted(complete, key=lambda trial: trial.rank) + dropped


def smooth_decoder(evaluator: Evaluator, trial: Trial) -> Trial:
    """Tries smoothings of the decoder, on a grid and then by the gradient of the squared error.

    Returns:
        The best trial; the one given unless the grid improves on it.
    """
    candidates = [_measure_with_smoothing(evaluator, trial, decoder=smoothing) for smoothing in _grid(trial)]
    best = min(candidates, key=lambda trial: trial.rank)
    if not best.measurement.improves_on(trial.measurement):
        return trial
    return _descend(evaluator, best, ("decoder",))


def smooth_encoder(evaluator: Evaluator, trial: Trial) -> Trial:
    """Tries larger and larger smoothings of the encoder while each improves, then both smoothings by the gradient.

    Each is tried with a decoder's smoothing of its own.

    Returns:
        The best trial; the one given if the encoder has no smoothing or nothing improves on it.
    """
    if smoothing_of(trial.option.code, "encoder") is None:
        return trial
    best = trial
    for smoothing in _grid(trial):
        candidate = smooth_decoder(evaluator, _measure_with_smoothing(evaluator, best, encoder=smoothing))
        # Each has to improve: the best of many would win on a small sample by chance.
        if not candidate.measurement.improves_on(best.measurement):
            break
        best = candidate
    return trial if best is trial else _descend(evaluator, best, ("encoder", "decoder"))


def _measure_again(evaluator, trial, num_groups):
    """Measures an option on more groups, in the space that was best, unless it has been."""
    if trial.measurement.num_groups >= num_groups:
        return trial
    return measure(evaluator, trial.option, [trial.measurement.output], num_groups)


def _halve(trials):
    """Splits trials into survivors, the better half and all that only copy inputs, and the others."""
    trials = sorted(trials, key=lambda trial: trial.rank)
    count = max(_NUM_FINALISTS, -(-len(trials) // 2))
    # The choice compares the best with those that only copy inputs, which cost no run of the model.
    losers = [trial for trial in trials[count:] if not trial.option.copies_only]
    return [trial for trial in trials if trial not in losers], losers


def _grid(trial):
    return [smoothing * float(trial.option.code.num_data) ** -4 for smoothing in _SMOOTHINGS]


def _measure_with_smoothing(evaluator, trial, **smoothings):
    """Measures an option with other smoothings, in the same space and on the same groups."""
    option = _change_smoothing(trial.option, **smoothings)
    return measure(evaluator, option, [trial.measurement.output], trial.measurement.num_groups)


def _change_smoothing(option, **smoothings):
    code = with_smoothing(option.code, **{side: float(value) for side, value in smoothings.items()})
    # Answers to the inputs of one encoder are of no use to another; a cache of their own keeps memory bounded.
    caches = {"cache": option.cache, "guesses": option.guesses}
    if "encoder" in smoothings:
        caches = {name: cache and cache.empty_copy() for name, cache in caches.items()}
    return dataclasses.replace(option, code=code, **caches)


def _descend(evaluator, trial, sides):
    """Lowers the squared error by the gradient of those smoothings that are not zero.

    With a prior, only by that of the decoder's: the derivative by the encoder's leaves out the prior's guesses.
    """
    sides = [side for side in sides if trial.option.guesses is None or side == "decoder"]
    smoothings = {side: smoothing_of(trial.option.code, side) for side in sides}
    smoothings = {side: smoothing for side, smoothing in smoothings.items() if smoothing}
    output, num_groups = trial.measurement.output, trial.measurement.num_groups

    def exponentiate(logarithms):
        return dict(zip(smoothings, np.exp(logarithms), strict=True))

    def logarithm_and_slopes(logarithms):
        """Computes the logarithm of the squared error, and its derivatives by the logarithms of the smoothings."""
        option = _change_smoothing(trial.option, **exponentiate(logarithms))
        square, decoder_slope, answer_slopes = evaluator.squared_error_slopes(
            option.code, output, *_answers_and_targets(option, num_groups)
        )
        slopes = {"decoder": decoder_slope}
        if "encoder" in smoothings:
            slopes["encoder"] = option.cache.encoder_slope(option.code, answer_slopes)
        return np.log(square), np.nan_to_num([slopes[side] / square for side in smoothings])

    start = np.log(list(smoothings.values()))
    try:
        optimum = optimize.minimize(
            logarithm_and_slopes,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=[(logarithm - np.log(10), logarithm + np.log(10)) for logarithm in start],
            options={"maxiter": 12, "ftol": 1e-5},
        )
    except NO_DERIVATIVES:
        return trial
    candidate = _measure_with_smoothing(evaluator, trial, **exponentiate(optimum.x))
    return candidate if candidate.rank < trial.rank else trial


def _answers_and_targets(option, num_groups):
    """Computes answers to the first groups, the workers' and the model's, and the prior's guesses of both."""

    def of_cache(cache):
        return cache.answers(option.code, num_groups), jax.tree.map(lambda leaf: leaf[:, :num_groups], cache.targets)

    return *of_cache(option.cache), None if option.guesses is None else Prior(*of_cache(option.guesses))
