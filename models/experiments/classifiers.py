"""Measures codes on trained classifiers as arXiv 2406.00300 does: E2 to E4, E7 and E8.

Codes decode class probabilities (softmax), at the paper's nodes. Every scheme sees the same images and stragglers. The
published RMSE is `E[(1/K) sum_k ||f(x_k) - fhat(x_k)||]`, the mean error norm; beside it stands the root mean square.
Beyond the paper: replication, whose lost inputs count as equal probabilities, replication filled from the nearest
answered image, of the request or of the batch, and the tuned code, which orders the batch.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float64

import jaxcode as jc
from jaxcode import interpolants

from ..comparison import Comparison, Scheme, compare, filled_schemes, mean_and_half_width, sample_masks, tuned_scheme
from ..datasets import Dataset

# Smoothings that are searched, with none.
SMOOTHINGS = np.array([0.0, *10.0 ** np.arange(-13.0, 1.0)])


@dataclasses.dataclass(frozen=True)
class Setting:
    """Holds the sizes of one published experiment.

    Attributes:
        num_workers: N.
        num_data: K.
        straggler_counts: The numbers S of stragglers.
    """

    num_workers: int
    num_data: int
    straggler_counts: tuple[int, ...]


@jc.pytree()
class FixedSignBerrut(interpolants.AbstractInterpolant):
    """Interpolates as `jc.interpolants.Berrut`, but with the signs of all knots, not those of knots that have data.

    Where an odd number of neighbours is missing, the two next to them have the same sign and the curve has a pole
    between them.

    References:
        arXiv 2009.08327, section III, read to the letter.
    """

    interpolates = True
    predicts_error = False

    def linop(self, knots, points, returned=None):
        return interpolants.dense_linop(_fixed_sign_matrix, knots, points, returned)


def _fixed_sign_matrix(knots, points, live):
    signs = jnp.where(live, jnp.where(jnp.arange(len(knots)) % 2 == 0, 1.0, -1.0), 0.0)
    distance = points[:, None] - knots
    is_knot = (distance == 0) & live
    terms = signs / jnp.where(distance == 0, 1.0, distance)
    terms = jnp.where(is_knot.any(axis=1, keepdims=True), is_knot, terms)
    return terms / terms.sum(axis=1, keepdims=True)


class CodedAnswers:
    """Keeps a classifier's answers to coded images, so that decoders are compared without running it again.

    Args:
        model: The classifier, from images to logits.
        images: Images; those that do not fill a request of K are left out.
        num_workers: N.
        num_data: K.
    """

    def __init__(
        self,
        model: nnx.Module,
        images: Float[np.ndarray, "images height width channels"],
        num_workers: int,
        num_data: int,
    ):
        self.num_workers = num_workers
        self.num_requests = len(images) // num_data
        grouped = np.asarray(images[: self.num_requests * num_data])
        self._grouped = grouped.reshape(self.num_requests, num_data, *images.shape[1:]).swapaxes(0, 1)
        graph, self._state = nnx.split(model)
        self._answer, self._mean_norm = _programs(graph, num_data, num_workers)
        self._answers = {}

    def mean_norms(
        self,
        smoothings: Sequence[tuple[float, float]],
        num_stragglers: int,
        *,
        num_sets: int,
        seed: int = 0,
    ) -> Float64[np.ndarray, "smoothings sets"]:
        """Measures LeTCC's mean norms for several smoothings under the same stragglers.

        Args:
            smoothings: Pairs of the encoder's and the decoder's smoothing.
            num_stragglers: S.
            num_sets: Straggler sets drawn for each request.
            seed: Seed of the stragglers.

        Returns:
            The mean norm of each pair and set, over requests and images.
        """
        masks = sample_masks(
            jax.random.key(seed),
            jnp.array([num_stragglers]),
            num_sets=num_sets,
            requests=self.num_requests,
            num_workers=self.num_workers,
        )
        results = []
        for encoder, decoder in smoothings:
            if encoder not in self._answers:
                self._answers[encoder] = self._answer(self._state, self._grouped, encoder)
            results.append(np.asarray(self._mean_norm(*self._answers[encoder], masks, decoder), np.float64))
        return np.stack(results)

    def search(self, num_stragglers: int, *, num_sets: int = 5, seed: int = 0) -> tuple[float, float]:
        """Searches the best smoothings of encoder and decoder, greedily: one, then the other, until none changes.

        Args:
            num_stragglers: S.
            num_sets: Straggler sets drawn for each request.
            seed: Seed of the stragglers.

        Returns:
            The encoder's and the decoder's smoothing, of `SMOOTHINGS`.
        """
        best = (0.0, 0.0)
        for _ in range(4):
            previous = best
            for position in (1, 0):
                pairs = [with_smoothing(best, position, float(value)) for value in SMOOTHINGS]
                norms = self.mean_norms(pairs, num_stragglers, num_sets=num_sets, seed=seed).mean(axis=1)
                best = pairs[int(np.nanargmin(norms))]
            if best == previous:
                break
        return best

    def search_all(
        self, counts: Sequence[int], *, seed: int = 0
    ) -> tuple[list[tuple[float, float]], tuple[float, float]]:
        """Searches the best smoothings for every number of stragglers, and a pair for all of them.

        Args:
            counts: The numbers S of stragglers.
            seed: Seed of the stragglers.

        Returns:
            The pair for each number, and that of them whose mean norms are lowest in relation to each number's own.
        """
        pairs = [self.search(count, seed=seed) for count in counts]
        candidates = list(dict.fromkeys(pairs))
        norms = [self.mean_norms(candidates, count, num_sets=5, seed=seed).mean(axis=1) for count in counts]
        excess = np.mean([row / row.min() for row in norms], axis=0)
        return pairs, candidates[int(excess.argmin())]


def with_smoothing(pair: tuple[float, float], position: int, value: float) -> tuple[float, float]:
    """Replaces the encoder's (position 0) or the decoder's (1) smoothing in a pair."""
    return (value, pair[1]) if position == 0 else (pair[0], value)


@functools.lru_cache(maxsize=4)
def _programs(graph, num_data: int, num_workers: int):
    """Compiles what computes the answers to coded images, and what decodes them."""
    nodes = jc.nodes.chebyshev(num_data, num_workers)

    @jax.jit
    def answer(state, grouped, smoothing):
        model = nnx.merge(graph, state)
        coded = jc.SplineCode(nodes.data, nodes.workers, encoder_smoothing=smoothing).encode(grouped)

        def probabilities(x):
            return jax.nn.softmax(model(x.reshape(-1, *x.shape[2:]))).reshape(*x.shape[:2], -1)

        return probabilities(grouped), probabilities(coded)

    @jax.jit
    def mean_norm(truth, answers, masks: Bool[Array, "sets requests workers"], smoothing):
        code = jc.SplineCode(nodes.data, nodes.workers, decoder_smoothing=smoothing)

        def of_set(returned):
            decoded = jax.vmap(code.decode, in_axes=(1, 0), out_axes=1)(answers, returned)
            return jc.metrics.mean_error_norm(decoded, truth)

        return jax.lax.map(of_set, masks)

    return answer, mean_norm


@dataclasses.dataclass(frozen=True)
class BestSmoothings:
    """Holds the best smoothings for several numbers of stragglers.

    Attributes:
        pairs: The encoder's and the decoder's for each number, found on training images.
        common: The pair that is best for all numbers together.
        costs: The mean error norm at the common pair, divided by that at a number's own, minus 1, for straggler sets of
            test images.
    """

    pairs: Float64[np.ndarray, "counts 2"]
    common: tuple[float, float]
    costs: Float64[np.ndarray, "counts sets"]


def best_smoothings(
    model: nnx.Module, data: Dataset, setting: Setting, *, num_images: int = 400, num_sets: int = 20, seed: int = 0
) -> BestSmoothings:
    """Searches the best smoothings for every number of stragglers, and measures what one pair for all costs: E7.

    Args:
        model: The classifier.
        data: Its data; smoothings are searched on training images, and costs are measured on test images.
        setting: The sizes.
        num_images: Images of either.
        num_sets: Straggler sets that costs are measured with.
        seed: Seed of the stragglers.
    """
    size = setting.num_workers, setting.num_data
    counts = setting.straggler_counts
    pairs, common = CodedAnswers(model, data.x_train[:num_images], *size).search_all(counts, seed=seed)
    held_out = CodedAnswers(model, data.x_test[:num_images], *size)
    costs = []
    for count, pair in zip(counts, pairs, strict=True):
        shared, own = held_out.mean_norms([common, pair], count, num_sets=num_sets, seed=seed)
        costs.append(shared / own - 1)
    return BestSmoothings(np.array(pairs), common, np.stack(costs))


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Holds how much worse results are at other smoothings than the best.

    Attributes:
        best: The encoder's and the decoder's smoothing that the search found on training images.
        positive: The best positive smoothing of the encoder, beside the decoder's best, and of the decoder, likewise.
        increases: The mean error norm at each of `SMOOTHINGS`, of the encoder (0) or the decoder (1) alone, divided by
            that at the positive one, minus 1; on test images.
    """

    best: tuple[float, float]
    positive: tuple[float, float]
    increases: Float64[np.ndarray, "2 smoothings seeds"]


def sensitivity(
    model: nnx.Module,
    data: Dataset,
    num_workers: int,
    num_data: int,
    num_stragglers: int,
    *,
    num_seeds: int = 20,
    batch_size: int = 200,
    seed: int = 0,
) -> Sensitivity:
    """Measures what smoothings other than the best cost: E8.

    Args:
        model: The classifier.
        data: Its data; smoothings are searched on training images and measured on test images.
        num_workers: N.
        num_data: K.
        num_stragglers: S.
        num_seeds: Repetitions, each with a batch of test images and stragglers.
        batch_size: Images of a repetition, at most a quarter of the test images, and twice as many for the search.
        seed: Seed of batches and stragglers.
    """
    size = num_workers, num_data
    batch_size = _limit(batch_size, num_data, data)
    searched = CodedAnswers(model, data.x_train[: 2 * batch_size], *size)
    best = searched.search(num_stragglers, seed=seed)
    pairs = [[with_smoothing(best, position, float(value)) for value in SMOOTHINGS] for position in (0, 1)]
    positive = []
    for candidates in pairs:
        norms = searched.mean_norms(candidates[1:], num_stragglers, num_sets=5, seed=seed).mean(axis=1)
        positive.append(1 + int(norms.argmin()))
    increases = []
    for i in range(num_seeds):
        images = data.x_test[np.random.default_rng((seed, i)).choice(len(data.x_test), batch_size, replace=False)]
        answers = CodedAnswers(model, images, *size)
        norms = answers.mean_norms([*pairs[0], *pairs[1]], num_stragglers, num_sets=5, seed=seed + i).mean(axis=1)
        norms = norms.reshape(2, -1)
        increases.append(norms / norms[[0, 1], positive][:, None] - 1)
    encoder, decoder = SMOOTHINGS[positive].tolist()
    return Sensitivity(best, (encoder, decoder), np.stack(increases, axis=-1))


def against_stragglers(
    model: nnx.Module,
    data: Dataset,
    setting: Setting,
    *,
    num_seeds: int = 20,
    batch_size: int = 400,
    seed: int = 0,
) -> Comparison:
    """Measures every scheme against the number of stragglers: E3 and E4.

    LeTCC's smoothings and the tuned code are chosen on training images: the smoothings for all numbers of stragglers
    together, the tuned code for the middle one.

    Args:
        model: The classifier.
        data: Its data.
        setting: The sizes.
        num_seeds: Repetitions, each with a batch of test images.
        batch_size: Images in a batch, at most a quarter of the test images, rounded down to a multiple of K.
        seed: Seed of batches and stragglers.
    """
    num_workers, num_data = setting.num_workers, setting.num_data
    size = {"num_data": num_data, "num_workers": num_workers}
    middle = setting.straggler_counts[len(setting.straggler_counts) // 2]
    batch_size = _limit(batch_size, num_data, data)
    sample = data.x_train[: max(batch_size, 2 * num_data)]
    _, smoothings = CodedAnswers(model, sample, num_workers, num_data).search_all(setting.straggler_counts, seed=seed)
    stragglers = jc.stragglers.Uniform(middle)
    options = {"batch_size": batch_size // num_data * num_data, "loss": "disagreement", "progress": False}
    tuned = jc.tune(model, sample, num_data, num_workers, stragglers, **options)
    letcc = jc.SplineCode.chebyshev(**size, encoder_smoothing=smoothings[0], decoder_smoothing=smoothings[1])
    fixed = jc.InterpolatingCode(jc.nodes.chebyshev(**size), interpolants.Berrut(), FixedSignBerrut())
    schemes = (
        Scheme("letcc", "LeTCC", letcc, "softmax"),
        Scheme("bacc", "BACC", jc.BerrutCode.chebyshev(**size), "softmax"),
        Scheme("bacc_fixed", "BACC, signs of all workers", fixed, "softmax"),
        Scheme("replication", "replication", jc.ReplicationCode(**size), "softmax"),
        *filled_schemes(**size)[:2],
        tuned_scheme(tuned),
    )
    return compare(
        model,
        data.x_test,
        data.y_test,
        schemes,
        setting.straggler_counts,
        num_data=num_data,
        num_workers=num_workers,
        batch_size=batch_size,
        num_seeds=num_seeds,
        seed=seed,
    )


def _limit(batch_size: int, num_data: int, data: Dataset) -> int:
    """Limits a batch to a quarter of the test images, so that repetitions have different ones, but not below K."""
    return max(num_data, min(batch_size, len(data.x_test) // 4))


def gains(comparison: Comparison, metric: str, scheme: str = "letcc", baseline: str = "bacc") -> tuple[float, float]:
    """Computes a scheme's relative difference from another, averaged over numbers of stragglers, in per cent: E2.

    Args:
        comparison: What `against_stragglers` returned.
        metric: A name in `comparison.METRICS`.
        scheme: The scheme's name.
        baseline: The other's name.

    Returns:
        The mean over repetitions and half the width of its 95 % interval.
    """
    values, others = (_values(comparison, metric, name) for name in (scheme, baseline))
    mean, half_width = mean_and_half_width(100 * (values / others - 1).mean(axis=0))
    return float(mean), float(half_width)


def differences(comparison: Comparison, metric: str, scheme: str, baseline: str) -> tuple[int, int]:
    """Counts for how many numbers of stragglers a scheme's metric is lower and higher than another's, beyond chance.

    Args:
        comparison: What `against_stragglers` returned.
        metric: A name in `comparison.METRICS`.
        scheme: The scheme's name.
        baseline: The other's name.

    Returns:
        How many 95 % intervals of the paired difference are below zero, and how many above.
    """
    values, others = (_values(comparison, metric, name) for name in (scheme, baseline))
    mean, half_width = mean_and_half_width(values - others)
    return int(np.sum(mean + half_width < 0)), int(np.sum(mean - half_width > 0))


def _values(comparison: Comparison, metric: str, name: str) -> Float64[np.ndarray, "counts seeds"]:
    names = [scheme.name for scheme in comparison.schemes]
    return comparison.values[metric][names.index(name)].astype(np.float64)
