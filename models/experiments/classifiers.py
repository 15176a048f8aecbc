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


def mean_norms(
    model: nnx.Module,
    images: Float[np.ndarray, "images height width channels"],
    setting: Setting,
    num_stragglers: int,
    smoothings: Sequence[tuple[float, float]],
    *,
    num_sets: int,
    seed: int = 0,
) -> Float64[np.ndarray, "smoothings sets"]:
    """Measures LeTCC's mean norms for several smoothings on the same images and stragglers.

    Args:
        model: The classifier, from images to logits.
        images: Images; those that do not fill a request of K are left out.
        setting: N and K.
        num_stragglers: S.
        smoothings: Pairs of the encoder's and the decoder's smoothing.
        num_sets: Straggler sets drawn for each request.
        seed: Seed of the stragglers.

    Returns:
        The mean norm of each pair and set, over requests and images.
    """
    num_requests = len(images) // setting.num_data
    grouped = np.asarray(images[: num_requests * setting.num_data])
    grouped = grouped.reshape(num_requests, setting.num_data, *images.shape[1:]).swapaxes(0, 1)
    masks = sample_masks(
        jax.random.key(seed),
        jnp.array([num_stragglers]),
        num_sets=num_sets,
        requests=num_requests,
        num_workers=setting.num_workers,
    )
    graph, state = nnx.split(model)
    answer, mean_norm = _programs(graph, setting.num_data, setting.num_workers)
    answers, results = {}, []
    for encoder, decoder in smoothings:
        if encoder not in answers:
            answers[encoder] = answer(state, grouped, encoder)
        results.append(np.asarray(mean_norm(*answers[encoder], masks, decoder), np.float64))
    return np.stack(results)


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


def search_smoothing(
    model: nnx.Module,
    images: Float[np.ndarray, "images height width channels"],
    setting: Setting,
    num_stragglers: int,
    *,
    num_sets: int = 5,
) -> tuple[float, float]:
    """Searches the best smoothings of encoder and decoder, greedily: one, then the other, until none changes.

    Args:
        model: The classifier.
        images: Images that are used for nothing else.
        setting: N and K.
        num_stragglers: S.
        num_sets: Straggler sets drawn for each request.

    Returns:
        The encoder's and the decoder's smoothing, of `SMOOTHINGS`.
    """
    best = (0.0, 0.0)
    for _ in range(4):
        previous = best
        for position in (1, 0):
            pairs = [(best[0], float(value)) if position else (float(value), best[1]) for value in SMOOTHINGS]
            norms = mean_norms(model, images, setting, num_stragglers, pairs, num_sets=num_sets).mean(axis=1)
            best = pairs[int(np.nanargmin(norms))]
        if best == previous:
            break
    return best


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
    encoder, decoder = search_smoothing(model, sample, setting, middle)
    tuned = jc.tune(model, sample, num_data, num_workers, jc.stragglers.Uniform(middle))
    letcc = jc.SplineCode.chebyshev(**size, encoder_smoothing=encoder, decoder_smoothing=decoder)
    fixed = jc.InterpolatingCode(jc.nodes.chebyshev(**size), interpolants.Berrut(), FixedSignBerrut())
    schemes = (
        Scheme("letcc", "LeTCC", letcc, "softmax"),
        Scheme("bacc", "BACC", jc.BerrutCode.chebyshev(**size), "softmax"),
        Scheme("bacc, fixed signs", "BACC, signs of all workers", fixed, "softmax"),
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


def gains(comparison: Comparison, metric: str) -> tuple[float, float]:
    """Computes LeTCC's mean relative difference from BACC over numbers of stragglers, and its 95 % half width: E2.

    Args:
        comparison: What `against_stragglers` returned.
        metric: A name in `comparison.METRICS`.
    """
    names = [scheme.name for scheme in comparison.schemes]
    letcc, bacc = (comparison.values[metric][names.index(name)].astype(np.float64) for name in ("letcc", "bacc"))
    mean, half_width = mean_and_half_width((letcc / bacc - 1).mean(axis=0))
    return float(mean), float(half_width)
