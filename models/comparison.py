"""Compares schemes on the same model, the same inputs and the same stragglers."""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray, Shaped
from scipy import stats
from tqdm import tqdm

import jaxcode as jc
from jaxcode.functions import Params, PureFunction, as_pure_function

from .datasets import Inputs
from .networks import stages

Fill = Callable[
    [Float[Array, "batch classes"], Bool[Array, "batch"], Float[Array, "batch ..."]], Float[Array, "batch classes"]
]
METRICS = ("accuracy", "relative_accuracy", "agreement", "rmse", "mean_error_norm", "lost")


@dataclass(frozen=True)
class Scheme:
    """Defines one way for N workers to answer K inputs.

    Codes mix, order and compare the points that `networks.stages` makes of inputs: images themselves, or embeddings of
    texts.

    Attributes:
        name: Short name, for files.
        label: Its name in tables and plots.
        code: The code; a code for fewer than N workers uses the first of them.
        output: What the code decodes, the model's logits or their softmax.
        order: Orders the points of a batch before they are grouped into requests; None for their own order.
        fill: Guesses the results of inputs that no worker returned from the results and points of the batch; None to
            leave them lost.
        prior: Guesses the model's answers; None for no prior.
        stragglers: Which workers are late, where copies are placed by the prior's risks, of which each request of a
            batch has its share; else None.
    """

    name: str
    label: str
    code: jc.AbstractCode
    output: Literal["softmax", "logits"]
    order: jc.ordering.Ordering | None = None
    fill: Fill | None = None
    prior: jc.Surrogate | None = None
    stragglers: jc.stragglers.AbstractStragglers | None = None


@dataclass(frozen=True)
class Comparison:
    """Holds the metrics of schemes.

    Attributes:
        schemes: The schemes.
        straggler_counts: How many of the N workers did not reply.
        values: By name in `METRICS`, float32 of shape (schemes, straggler counts, seeds).
        base_accuracy: Accuracy of the model itself, no stragglers, on the inputs of each seed.
    """

    schemes: tuple[Scheme, ...]
    straggler_counts: tuple[int, ...]
    values: dict[str, Float32[np.ndarray, "schemes counts seeds"]]
    base_accuracy: Float32[np.ndarray, "seeds"]

    def interval(self, metric: str) -> tuple[Float[np.ndarray, "schemes counts"], Float[np.ndarray, "schemes counts"]]:
        """Computes the mean over seeds, and half the width of its 95 % confidence interval (Student's t)."""
        return mean_and_half_width(self.values[metric])


def mean_and_half_width(
    values: Float[np.ndarray, "*rest seeds"],
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Computes the mean over the last axis and half the width of its 95 % confidence interval, by Student's t.

    Raises:
        ValueError: If there are fewer than two values, which have no interval.
    """
    values = np.asarray(values, np.float64)
    num_seeds = values.shape[-1]
    if num_seeds < 2:
        raise ValueError(f"a confidence interval needs at least 2 seeds, got {num_seeds}")
    half_width = stats.t.ppf(0.975, num_seeds - 1) * values.std(axis=-1, ddof=1) / np.sqrt(num_seeds)
    return values.mean(axis=-1), half_width


def standard_schemes(num_data: int, num_workers: int) -> tuple[Scheme, ...]:
    """Makes the schemes of the literature as published, and improved ones.

    LeTCC (arXiv 2406.00300) and BACC (2009.08327) have the nodes of their papers and decode softmax outputs,
    as in their experiments. LeTCC's smoothing is the best of a grid on digits with (N, K, S) = (60, 20, 20),
    1e-8 for the decoder and none for the encoder. On logits no smoothing was best.

    Args:
        num_data: K.
        num_workers: N, at least K.

    Returns:
        Schemes without coding, the published codes, then those that jaxcode adds.
    """
    size = {"num_data": num_data, "num_workers": num_workers}
    smoothed = jc.SplineCode.chebyshev(**size, decoder_smoothing=1e-8)
    chebyshev = jc.SplineCode.chebyshev(**size)
    repeated = jc.SplineCode.repeated(**size)
    return (
        Scheme("uncoded", f"uncoded, {num_data} workers", jc.UncodedCode(num_data), "softmax"),
        Scheme("replication", "replication", jc.ReplicationCode(num_data, num_workers), "softmax"),
        Scheme("bacc", "BACC, as published", jc.BerrutCode.chebyshev(**size), "softmax"),
        Scheme("letcc", "LeTCC, as published", smoothed, "softmax"),
        Scheme("logits", "LeTCC on logits", chebyshev, "logits"),
        Scheme("ordered", "LeTCC on logits, ordered", chebyshev, "logits", jc.ordering.greedy),
        Scheme("repeated", "repeated, logits, ordered", repeated, "logits", jc.ordering.greedy),
    )


def filled_schemes(num_data: int, num_workers: int) -> tuple[Scheme, ...]:
    """Makes replication whose lost inputs are guessed, the baselines that a code must beat.

    Args:
        num_data: K.
        num_workers: N, at least K.

    Returns:
        Replication filled from the nearest answered input of the batch, from the nearest of the request, which is all
        that a single request has, and by kernel ridge regression on the batch.
    """
    code = jc.ReplicationCode(num_data, num_workers)
    fill_in_request = partial(fill_from_nearest, group_size=num_data)
    return (
        Scheme("nearest", "replication + nearest input", code, "logits", fill=fill_from_nearest),
        Scheme("nearest_of_request", "replication + nearest of request", code, "logits", fill=fill_in_request),
        Scheme("ridge", "replication + kernel ridge", code, "logits", fill=fill_by_ridge),
    )


def prior_schemes(
    prior: jc.Surrogate, num_data: int, num_workers: int, stragglers: jc.stragglers.AbstractStragglers
) -> tuple[Scheme, ...]:
    """Makes replication whose lost inputs have the logits that a surrogate guesses, which needs no other inputs.

    Args:
        prior: The surrogate.
        num_data: K.
        num_workers: N, at least K.
        stragglers: Which workers are late.

    Returns:
        Replication, and the same with copies for the inputs of which the surrogate is least sure.
    """
    code = jc.ReplicationCode(num_data, num_workers)
    return (
        Scheme("surrogate", "replication + surrogate", code, "logits", prior=prior),
        Scheme("placed", "replication + surrogate, placed", code, "logits", None, None, prior, stragglers),
    )


def fill_from_nearest(
    results: Float[Array, "batch classes"],
    is_lost: Bool[Array, "batch"],
    inputs: Float[Array, "batch ..."],
    *,
    group_size: int | None = None,
) -> Float[Array, "batch classes"]:
    """Gives every lost input the result of the input nearest to it, by Euclidean distance, that is not lost.

    Args:
        results: Results; those of lost inputs are not read.
        is_lost: Which they are.
        inputs: The inputs.
        group_size: Look only among so many inputs in a row; None for the whole batch. Where all are lost, they stay so.
    """
    groups = jnp.arange(len(inputs)) // (group_size or len(inputs))
    is_candidate = ~is_lost & (groups[:, None] == groups)
    distances = jnp.where(is_candidate, _squared_distances(inputs), jnp.inf)
    is_filled = is_lost & is_candidate.any(axis=1)
    return jnp.where(is_filled[:, None], results[jnp.argmin(distances, axis=1)], results)


def fill_by_ridge(
    results: Float[Array, "batch classes"], is_lost: Bool[Array, "batch"], inputs: Float[Array, "batch ..."]
) -> Float[Array, "batch classes"]:
    """Predicts the results of lost inputs from all others by kernel ridge regression.

    The kernel is Gaussian; its length scale is half the median distance of inputs, its ridge .01.

    Args:
        results: Results; those of lost inputs are not read.
        is_lost: Which they are.
        inputs: The inputs.
    """
    distances = _squared_distances(inputs)
    kernel = jnp.exp(-distances / (2 * _RIDGE_LENGTH**2 * jnp.median(distances)))
    answered = jnp.where(is_lost, 0.0, 1.0)
    known = jnp.where(is_lost[:, None], 0, results)
    mean = known.sum(axis=0) / jnp.maximum(answered.sum(), 1)
    # Rows and columns of lost inputs are those of the identity, so that their coefficients are zero.
    matrix = kernel * answered * answered[:, None] + jnp.diag(jnp.where(is_lost, 1.0, _RIDGE))
    coefficients = jax.scipy.linalg.solve(matrix, answered[:, None] * (known - mean), assume_a="pos")
    return jnp.where(is_lost[:, None], mean + kernel @ coefficients, results)


# Of lengths .3, .5 and 1 and ridges .001 to .1, the best on MNIST's training images with (N, K, S) = (30, 20, 5).
_RIDGE_LENGTH = 0.5
_RIDGE = 0.01


def _squared_distances(inputs):
    inputs = inputs.reshape(len(inputs), -1)
    squares = jnp.sum(inputs**2, axis=1)
    products = jnp.matmul(inputs, inputs.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(squares[:, None] + squares - 2 * products, 0)


def tuned_scheme(tuned: jc.tuning.Tuned, name: str = "tuned", label: str = "tuned") -> Scheme:
    """Makes the scheme that tuning chose, for a model that returns logits."""
    return Scheme(name, label, tuned.code, "logits", tuned.order, None, tuned.prior, tuned.stragglers)


def compare(
    model: nnx.Module,
    x: Inputs,
    y: Int[np.ndarray, "inputs"],
    schemes: Sequence[Scheme],
    straggler_counts: Sequence[int],
    *,
    num_data: int,
    num_workers: int,
    batch_size: int,
    num_seeds: int,
    num_sets: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Measures every scheme on the same batches under the same stragglers.

    For each seed a batch is drawn from the inputs and grouped into requests of K, and for each request random sets of
    stragglers are drawn. The set of a smaller straggler count is a part of that of a larger one. The model runs once
    for each scheme and batch, since a worker's answer does not depend on which others reply; only the decoding is done
    for every mask. Workers compute the second of the model's `networks.stages`; a prior guesses from the inputs.

    Args:
        model: Classifier in evaluation mode, from images or texts to logits.
        x: Inputs to draw from.
        y: Their classes.
        schemes: The schemes.
        straggler_counts: How many of the N workers do not reply; each at most N - 2.
        num_data: K, inputs in a request.
        num_workers: N.
        batch_size: Inputs in a batch, at most the number of inputs; rounded down to a multiple of K.
        num_seeds: Number of batches, at least 2 for an interval.
        num_sets: How many straggler sets are drawn for each request; figures of a batch are means over them.
        seed: Seed of batches and stragglers.
        progress: Whether to show a progress bar on standard error.

    Returns:
        Metrics of every scheme, straggler count and seed.
    """
    (embed, embed_params), (body, params) = (as_pure_function(stage) for stage in stages(model))
    requests = batch_size // num_data

    # Batches are ordered outside of the compiled programs, so that schemes that differ in the order alone share one.
    def key(s: Scheme):
        return s.code, s.output, s.fill, s.prior, s.stragglers

    programs = {key(s): jax.jit(partial(_measure, s, body, num_data)) for s in schemes}
    compiled_embed, compiled_body = jax.jit(embed), jax.jit(body)
    sample = jax.jit(partial(sample_masks, num_sets=num_sets, requests=requests, num_workers=num_workers))
    counts = jnp.asarray(straggler_counts)
    values = {m: np.zeros((len(schemes), len(straggler_counts), num_seeds), np.float32) for m in METRICS}
    base_accuracy = np.zeros(num_seeds, np.float32)
    with tqdm(total=num_seeds * len(schemes), desc="comparing", unit="batch", disable=not progress) as bar:
        for i in range(num_seeds):
            indices = np.random.default_rng((seed, i)).choice(len(x), requests * num_data, replace=False)
            inputs, labels = jnp.asarray(x[indices]), jnp.asarray(y[indices])
            masks = sample(jax.random.fold_in(jax.random.key(seed), i), counts)
            points = compiled_embed(embed_params, inputs)
            targets = compiled_body(params, points)
            base_accuracy[i] = jc.metrics.accuracy(targets, labels)
            permutations = {}
            for j, scheme in enumerate(schemes):
                grouping = scheme.order, scheme.stragglers and scheme.prior
                if grouping not in permutations:
                    permutations[grouping] = _permutation(scheme, inputs, points, num_data)
                index = permutations[grouping]
                batch = inputs[index], points[index], labels[index], targets[index]
                metrics = programs[key(scheme)](params, *batch, masks)
                for metric in METRICS:
                    values[metric][j, :, i] = np.mean(metrics[metric].reshape(num_sets, -1), axis=0)
                bar.update()
    return Comparison(tuple(schemes), tuple(straggler_counts), values, base_accuracy)


def figures(comparison: Comparison) -> Iterator[tuple[str, int, str, str, str, str]]:
    """Yields scheme, straggler count, metric, and as text the mean over seeds and the ends of its 95 % interval."""
    for metric in METRICS:
        mean, half_width = comparison.interval(metric)
        for i, scheme in enumerate(comparison.schemes):
            for j, count in enumerate(comparison.straggler_counts):
                low, high = mean[i, j] - half_width[i, j], mean[i, j] + half_width[i, j]
                yield scheme.name, count, metric, f"{mean[i, j]:.6f}", f"{low:.6f}", f"{high:.6f}"


def write_csv(comparison: Comparison, path: Path) -> None:
    """Writes one row for each scheme, straggler count and metric: mean and 95 % interval over seeds."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("scheme", "num_stragglers", "metric", "mean", "low", "high"))
        writer.writerows(figures(comparison))


def sample_masks(
    key: PRNGKeyArray, counts: Int[Array, "counts"], *, num_sets: int, requests: int, num_workers: int
) -> Bool[Array, "masks requests workers"]:
    """Draws masks, those of all counts for the first set, then for the next."""
    keys = jax.random.split(key, (num_sets, requests))

    def sample(count: Int[Array, ""], key: PRNGKeyArray) -> Bool[Array, "workers"]:
        return jc.stragglers.Uniform(count).sample(key, num_workers=num_workers)

    sample_requests = jax.vmap(sample, (None, 0))
    masks = jax.vmap(jax.vmap(sample_requests, (0, None)), (None, 0))(counts, keys)
    return masks.reshape(-1, requests, num_workers)


def _permutation(
    scheme: Scheme, inputs: Shaped[Array, "batch ..."], points: Float[Array, "batch ..."], num_data: int
) -> Int[np.ndarray, "batch"]:
    """Orders a batch as `jaxcode.coded` does."""
    if scheme.order is not None:
        return np.asarray(scheme.order(points, num_data))
    if scheme.stragglers is not None and scheme.prior is not None:
        return np.asarray(jc.allocation.spread(scheme.prior.with_risk(inputs, "disagreement")[1], num_data))
    return np.arange(len(points))


def _measure(
    scheme: Scheme,
    body: PureFunction,
    num_data: int,
    params: Params,
    inputs: Shaped[Array, "batch ..."],
    points: Float[Array, "batch ..."],
    labels: Int[Array, "batch"],
    targets: Float[Array, "batch classes"],
    masks: Bool[Array, "masks requests workers"],
) -> dict[str, Float[Array, "masks"]]:
    """Measures one scheme on one batch, for each mask."""
    requests = len(points) // num_data

    def group(rows: Shaped[Array, "batch ..."]) -> Shaped[Array, "requests data ..."]:
        return rows.reshape(requests, num_data, *rows.shape[1:])

    plans = None
    if scheme.prior is not None:
        planner = jc.allocation.make_planner(scheme.code, scheme.prior, scheme.stragglers, "disagreement")
        guesses = jax.tree.map(group, planner.guess(inputs))
        plans = jax.vmap(partial(planner.plan, scheme.code))(group(inputs), guesses)
    elif isinstance(scheme.code, jc.KernelCode):
        plans = jax.vmap(scheme.code.plan)(group(points))
    coded = jax.vmap(scheme.code.encode, out_axes=1)(group(points), plans)
    num_workers = coded.shape[0]
    logits = body(params, coded.reshape(-1, *points.shape[1:])).reshape(num_workers, requests, -1)
    answers = logits if scheme.output == "logits" else jax.nn.softmax(logits)

    def decode(returned: Bool[Array, "requests workers"]) -> Float[Array, "requests data classes"]:
        if not isinstance(scheme.code, jc.KernelCode):
            return jax.vmap(scheme.code.decode, in_axes=(1, 0, 0))(answers, returned, plans)
        # Answers of all requests tell about each other; rows of the joined code are (N, requests) and (K, requests).
        assert plans is not None
        code, plan = scheme.code.join(plans)
        results = code.decode(answers.reshape(code.num_workers, -1), returned.T.reshape(-1), plan)
        return jnp.swapaxes(results.reshape(num_data, requests, -1), 0, 1)

    def measure_mask(returned: Bool[Array, "requests workers"]) -> dict[str, Float[Array, ""]]:
        returned = returned[:, :num_workers]
        decoded = decode(returned).reshape(targets.shape)
        is_lost = jnp.logical_not(jax.vmap(scheme.code.recovered)(returned, plans)).reshape(-1)
        if scheme.fill is not None:
            decoded = scheme.fill(decoded, is_lost, points)
        probabilities = jax.nn.softmax(decoded) if scheme.output == "logits" else decoded
        # Where nothing is known, every class has the same probability.
        is_unknown = jnp.isnan(decoded).any(axis=-1)
        filled = jnp.where(is_unknown[:, None], 1 / targets.shape[-1], probabilities)
        truth = jax.nn.softmax(targets)
        return {
            "accuracy": jc.metrics.accuracy(decoded, labels),
            "relative_accuracy": jc.metrics.relative_accuracy(decoded, targets, labels),
            "agreement": jc.metrics.agreement(decoded, targets),
            "rmse": jc.metrics.rmse(filled, truth),
            "mean_error_norm": jc.metrics.mean_error_norm(filled, truth),
            "lost": jnp.mean(is_lost),
        }

    return jax.lax.map(measure_mask, masks)
