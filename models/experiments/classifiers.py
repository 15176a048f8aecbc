"""Measures codes on trained classifiers as arXiv 2406.00300 does: E2 to E4, E7 and E8.

Codes decode class probabilities (softmax), at the paper's nodes. Every scheme sees the same images and stragglers. The
published loss, `E[(1/K) sum_k ||f(x_k) - fhat(x_k)||]`, is called the mean norm here; beside it stands the root mean
square. Beyond the paper: plain replication, replication filled from the nearest answered image, and the tuned code.
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

    Where data are missing, two neighbours have the same sign and the curve has a pole between them.

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

    def search(self, num_stragglers: int, *, num_sets: int = 5) -> tuple[float, float]:
        """Searches the best smoothings of encoder and decoder, greedily: one, then the other, until none changes.

        Args:
            num_stragglers: S.
            num_sets: Straggler sets drawn for each request.

        Returns:
            The encoder's and the decoder's smoothing, of `SMOOTHINGS`.
        """
        best = (0.0, 0.0)
        for _ in range(4):
            previous = best
            for position in (1, 0):
                pairs = [with_smoothing(best, position, float(value)) for value in SMOOTHINGS]
                norms = self.mean_norms(pairs, num_stragglers, num_sets=num_sets).mean(axis=1)
                best = pairs[int(np.nanargmin(norms))]
            if best == previous:
                break
        return best


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


def smoothings_against_stragglers(
    model: nnx.Module, images: Float[np.ndarray, "images height width channels"], setting: Setting
) -> Float64[np.ndarray, "counts 2"]:
    """Searches the best smoothings for every number of stragglers, on the same images: E7.

    Args:
        model: The classifier.
        images: Images that are used for nothing else.
        setting: The sizes.

    Returns:
        The encoder's and the decoder's smoothing for each number of stragglers.
    """
    answers = CodedAnswers(model, images, setting.num_workers, setting.num_data)
    return np.array([answers.search(count) for count in setting.straggler_counts])


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Holds how much worse results are at other smoothings than the best.

    Attributes:
        best: The encoder's and the decoder's smoothing that the search found, on other images.
        increases: The mean norm at each of `SMOOTHINGS`, of the encoder (0) or the decoder (1) alone, divided by that
            at the best, minus 1.
    """

    best: tuple[float, float]
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
) -> Sensitivity:
    """Measures what smoothings other than the best cost: E8.

    Args:
        model: The classifier.
        data: Its data; smoothings are searched on training images and measured on test images.
        num_workers: N.
        num_data: K.
        num_stragglers: S.
        num_seeds: Repetitions, each with other images and stragglers.
        batch_size: Images of a repetition, and twice as many for the search.
    """
    size = num_workers, num_data
    best = CodedAnswers(model, data.x_train[: 2 * batch_size], *size).search(num_stragglers)
    pairs = [with_smoothing(best, position, float(value)) for position in (0, 1) for value in SMOOTHINGS]
    increases = []
    for seed in range(num_seeds):
        images = data.x_test[np.random.default_rng((0, seed)).choice(len(data.x_test), batch_size, replace=False)]
        answers = CodedAnswers(model, images, *size)
        norms = answers.mean_norms([best, *pairs], num_stragglers, num_sets=5, seed=seed).mean(axis=1)
        increases.append(norms[1:] / norms[0] - 1)
    return Sensitivity(best, np.stack(increases, axis=-1).reshape(2, len(SMOOTHINGS), num_seeds))


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

    LeTCC's smoothings and the tuned code are chosen on training images, for the middle number of stragglers.

    Args:
        model: The classifier.
        data: Its data.
        setting: The sizes.
        num_seeds: Repetitions, each with a batch of test images.
        batch_size: Images in a batch, rounded down to a multiple of K.
        seed: Seed of batches and stragglers.
    """
    num_workers, num_data = setting.num_workers, setting.num_data
    size = {"num_data": num_data, "num_workers": num_workers}
    middle = setting.straggler_counts[len(setting.straggler_counts) // 2]
    sample = data.x_train[: max(batch_size, 2 * num_data)]
    encoder, decoder = CodedAnswers(model, sample, num_workers, num_data).search(middle)
    tuned = jc.tune(model, sample, num_data, num_workers, jc.stragglers.Uniform(middle), progress=False)
    letcc = jc.SplineCode.chebyshev(**size, encoder_smoothing=encoder, decoder_smoothing=decoder)
    fixed = jc.InterpolatingCode(jc.nodes.chebyshev(**size), interpolants.Berrut(), FixedSignBerrut())
    schemes = (
        Scheme("letcc", "LeTCC", letcc, "softmax"),
        Scheme("bacc", "BACC", jc.BerrutCode.chebyshev(**size), "softmax"),
        Scheme("bacc_fixed", "BACC, signs of all workers", fixed, "softmax"),
        Scheme("replication", "replication", jc.ReplicationCode(**size), "softmax"),
        filled_schemes(**size)[0],
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


def gains(comparison: Comparison, metric: str, scheme: str = "letcc", beside: str = "bacc") -> tuple[float, float]:
    """Computes a scheme's relative difference from another, meant over numbers of stragglers, in per cent: E2.

    Args:
        comparison: What `against_stragglers` returned.
        metric: A name in `comparison.METRICS`.
        scheme: The scheme's name.
        beside: The other's name.

    Returns:
        The mean over repetitions and half the width of its 95 % interval.
    """
    names = [scheme.name for scheme in comparison.schemes]
    values, others = (comparison.values[metric][names.index(name)].astype(np.float64) for name in (scheme, beside))
    mean, half_width = mean_and_half_width(100 * (values / others - 1).mean(axis=0))
    return float(mean), float(half_width)
