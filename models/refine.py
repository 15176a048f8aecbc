"""Measures what training through the decoder gains on two regressions: `python -m models.refine`."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jaxcode as jc

from . import datasets
from .learning_curve import batches, expected_loss
from .networks import DEFAULT_NETWORKS, load_stored
from .sweeps import integrate
from .training import compute_logits

_NUM_STEPS = 60
_PRIOR_SETTING = 30, 20, 5
_BATCH = 500
_FOOTNOTE = """\
Mean square error over {requests} requests of K inputs and {sets} straggler sets, relative to the outputs' variance,
with the smallest and the largest of {seeds} seeds, and its ratio to that of what is tuned. Each seed has {sample} other
requests, of which `jc.tune` chooses a code and its smoothings, or `jc.training.refine` trains one, a quarter of them
held out. A kernel code that is tuned and then refined is the one refined at once, as training finds its own start. By
sensitivity: a kernel code of which the features are the inputs in the metric of the model's mean squared slopes."""


class Regression(NamedTuple):
    """Holds a model and how its inputs are drawn.

    Attributes:
        f: From a batch of inputs to its results.
        draw: From a generator and a number to so many inputs.
        settings: N, K, S.
    """

    f: Callable[[Array], Array]
    draw: Callable[[np.random.Generator, int], Float[np.ndarray, "inputs numbers"]]
    settings: tuple[tuple[int, int, int], ...]


def pendulum(x: Float[Array, "batch 4"]) -> Float[Array, "batch 2"]:
    """Computes the state of a driven pendulum after 5 units of time.

    Args:
        x: Damping, strength and frequency of the drive, and first angle.

    Returns:
        Angle and speed.
    """

    def solve(parameters):
        damping, strength, frequency, angle = parameters

        def derivative(state, _):
            angle, speed, time = state
            drive = strength * jnp.cos(frequency * time)
            return jnp.stack([speed, drive - damping * speed - jnp.sin(angle), jnp.ones_like(time)])

        start = jnp.stack([angle, jnp.zeros_like(angle), jnp.zeros_like(angle)])
        return integrate(derivative, start, None, 5.0, num_steps=_NUM_STEPS)[:2]

    return jax.vmap(solve)(x)


def draw_pendulums(rng: np.random.Generator, count: int) -> Float[np.ndarray, "inputs 4"]:
    """Draws parameters of pendulums, uniformly."""
    return rng.uniform((0.05, 0.1, 0.5, 0.2), (0.5, 1.0, 1.2, 1.0), size=(count, 4)).astype(np.float32)


def perceptron(x: Float[Array, "batch 8"]) -> Float[Array, "batch 3"]:
    """Computes a perceptron of random weights, of two hidden layers, which depends on some inputs more than others."""
    rng = np.random.default_rng(5)
    first, second, last = (
        rng.normal(size=shape).astype(np.float32) * scale / np.sqrt(shape[0])
        for shape, scale in (((8, 32), 1.5), ((32, 32), 1.5), ((32, 3), 1.0))
    )
    weights = np.array([2, 1, 1, 0.5, 0.5, 0.2, 0.1, 0.1], np.float32)
    return jnp.tanh(jnp.tanh(x * weights @ first) @ second) @ last


def draw_normal(rng: np.random.Generator, count: int) -> Float[np.ndarray, "inputs 8"]:
    """Draws normal inputs."""
    return rng.normal(size=(count, 8)).astype(np.float32)


REGRESSIONS = {
    "a driven pendulum, four parameters": Regression(pendulum, draw_pendulums, ((30, 20, 5), (12, 8, 2))),
    "a random perceptron, eight inputs": Regression(perceptron, draw_normal, ((30, 20, 5),)),
}


def compare(
    regression: Regression,
    setting: tuple[int, int, int],
    *,
    num_sample: int,
    num_requests: int,
    num_sets: int,
    seed: int,
) -> dict[str, float]:
    """Measures codes, each on requests that it was not tuned or trained on.

    Args:
        regression: The model and its inputs.
        setting: N, K, S.
        num_sample: Requests to tune and to train on.
        num_requests: Requests to measure on.
        num_sets: Straggler sets of each.
        seed: Of requests, sets and training.

    Returns:
        The mean square error in units of the outputs' variances, by column.
    """
    num_workers, num_data, num_late = setting
    f, draw, _ = regression
    rng = np.random.default_rng((seed, *setting))
    sample, requests = (draw(rng, count * num_data) for count in (num_sample, num_requests))
    stragglers = jc.stragglers.Uniform(num_late)
    targets = jax.jit(f)(requests)
    variance = np.var(targets, axis=0)
    requests, targets = (leaf.reshape(num_requests, num_data, -1) for leaf in (requests, targets))
    masks = jax.vmap(lambda key: stragglers.sample(key, num_workers))(jax.random.split(jax.random.key(seed), num_sets))

    def error(predict):
        results = jax.lax.map(lambda x: jax.vmap(predict, (None, 0))(x, masks), requests)
        return float(jnp.mean(jnp.square(results - targets[:, None]) / variance))

    tuned = jc.tune(f, sample, num_data, num_workers, stragglers, num_masks=64, progress=False)
    late = num_late / num_workers
    sensitivity = jc.ordering.sensitivity(f, sample)
    kernel = jc.KernelCode(num_data, num_workers, late=late)
    refine = functools.partial(jc.training.refine, f, inputs=sample, stragglers=stragglers, seed=seed, progress=False)
    codes = {
        "tuned": tuned,
        "by sensitivity": jc.coded(f, dataclasses.replace(kernel, features=sensitivity)),
        "kernel, refined": refine(kernel),
    }
    is_curve = isinstance(tuned.code, jc.InterpolatingCode)
    codes["tuned, refined"] = refine(tuned.code, order=tuned.order) if is_curve else codes["kernel, refined"]
    return {name: error(code if isinstance(code, jc.Coded) else code.coded(f)) for name, code in codes.items()}


def compare_priors(dataset: str, count: int, *, data_dir: str | None, out: Path, seed: int) -> None:
    """Prints what a surrogate loses on test images, before and after it is trained on more images in two ways.

    Args:
        dataset: The images, of which the network is the default one.
        count: Images that it is distilled from, and as many others that it is trained on.
        data_dir: Folder of the data sets.
        out: Folder of trained weights.
        seed: Of the images and of training.
    """
    data, network = datasets.load(dataset, data_dir), DEFAULT_NETWORKS[dataset]
    model = load_stored(network, data, dataset, out)
    order = np.random.default_rng(seed).permutation(len(data.x_train))
    first, others = data.x_train[order[:count]], data.x_train[order[count : 2 * count]]
    classes = compute_logits(model, data.x_test).argmax(axis=1)
    num_workers, num_data, num_late = _PRIOR_SETTING

    def show(label, prior):
        parts = [prior.with_risk(part, "disagreement") for part in batches(data.x_test, _BATCH)]
        guesses, risk = (np.concatenate(part) for part in zip(*parts, strict=True))
        is_wrong = guesses.argmax(axis=1) != classes
        loss = expected_loss(risk, prior.cost, is_wrong, _PRIOR_SETTING, num_data)
        print(f"{label:>24}: {loss.format()}; of another class {is_wrong.mean():.4f}", flush=True)

    prior = jc.surrogate(model, first, seed=seed, progress=False)
    print(f"{network} on {dataset}, {_PRIOR_SETTING}, seed {seed}: multiples of replication's loss, and at equal work")
    show("distilled", prior)
    code = jc.ReplicationCode(num_data, num_workers)
    # Where all workers are late, all guesses count alike.
    for label, late in (("through the decoder", num_late), ("all guesses count alike", num_workers)):
        stragglers = jc.stragglers.Uniform(late)
        refined = jc.training.refine(
            model, code, others, stragglers, prior=prior, loss="disagreement", seed=seed, progress=False
        )
        print(refined)
        show(label, refined.prior)
    images = np.concatenate([first, others])
    show("distilled from all", jc.surrogate(model, images, seed=seed, progress=False))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table of both regressions, or with --dataset what surrogates lose.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid.
    """
    parser = argparse.ArgumentParser(prog="python -m models.refine", description=__doc__)
    parser.add_argument("--sample", type=int, default=40, help="requests to tune and to train on")
    parser.add_argument("--requests", type=int, default=40, help="requests to measure on")
    parser.add_argument("--sets", type=int, default=32, help="straggler sets of each request")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, from 0")
    parser.add_argument("--dataset", choices=datasets.NAMES, help="train surrogates of a network instead")
    parser.add_argument("--inputs", type=int, default=1000, help="images to distil from, and as many to train on")
    parser.add_argument("--data-dir", help="folder of the data sets; JAXCODE_DATA if not given")
    parser.add_argument("--out", type=Path, default=Path("out/refine"), help="folder of trained weights")
    args = parser.parse_args(argv)
    if args.sample < 4 or min(args.requests, args.sets, args.seeds) < 1:
        parser.error("--sample must be at least 4, --requests, --sets and --seeds at least 1")
    if args.dataset is not None:
        for seed in range(args.seeds):
            compare_priors(args.dataset, args.inputs, data_dir=args.data_dir, out=args.out, seed=seed)
        return
    for name, regression in REGRESSIONS.items():
        for setting in regression.settings:
            runs = []
            for seed in range(args.seeds):
                sizes = {"num_sample": args.sample, "num_requests": args.requests, "num_sets": args.sets}
                runs.append(compare(regression, setting, **sizes, seed=seed))
                print(f"seed {seed}:", *(f"{key} {value:.3g};" for key, value in runs[-1].items()), flush=True)
            print(f"{name}, {setting}")
            for column in runs[0]:
                errors = np.array([run[column] for run in runs])
                ratios = errors / [run["tuned"] for run in runs]
                print(
                    f"  {column:>16} {errors.mean():.2e} ({errors.min():.2e}, {errors.max():.2e}), ratio "
                    f"{ratios.mean():.2f} ({ratios.min():.2f}, {ratios.max():.2f})",
                    flush=True,
                )
    print(_FOOTNOTE.format(**vars(args)))


if __name__ == "__main__":
    main()
