"""Classifies images although a third of the workers never reply: `python -m models.demo`."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxcode as jc

from . import datasets
from .comparison import (
    Comparison,
    compare,
    filled_schemes,
    prior_schemes,
    standard_schemes,
    tuned_scheme,
    write_csv,
)
from .datasets import Dataset
from .networks import DEFAULT_NETWORKS, load_stored
from .plots import plot_comparison, plot_request
from .serialization import num_parameters
from .training import accuracy

_FOOTNOTE = """\
Means over {num_seeds} batches of {batch} test images, with 95 % intervals (Student's t), of one trained
network. Each request of {num_data} images loses {num_stragglers} random workers, the same for every scheme;
uncoded has the first {num_data} workers. RelAcc: accuracy over that without stragglers.
Agreement: the same class as without stragglers. RMSE: of the class probabilities, norm over
classes. Lost: inputs without any answer; unless guessed they count as wrong, and in the RMSE as
equal probabilities. Ordered: the images of a batch are ordered, similar ones next to each other, before
they are grouped into requests, so the whole batch must be at hand. Repeated: workers compute the
inputs themselves, as in replication, and the spline fills in those that no worker returned.
Nearest, kernel ridge and surrogate guess the lost inputs, from the batch or by a small network;
placed: with copies for the inputs that the surrogate is least sure of. Tuned: chosen on training
images, with the surrogate."""

_SURROGATE_IMAGES = 3000


def main(argv: Sequence[str] | None = None) -> None:
    """Loads a network, predicts through a code, compares schemes and draws them.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    error = _argument_error(args)
    if error:
        parser.error(error)
    try:
        data = datasets.load(args.dataset, args.data_dir)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    if not args.num_data <= args.batch_size <= len(data.x_test):
        parser.error(
            f"--batch-size must be from --num-data ({args.num_data}) to the {len(data.x_test)} test images, "
            f"got {args.batch_size}"
        )
    start = time.perf_counter()
    model = _load(data, args)
    prior = _distil(model, data, args)
    tuned = _tune(model, prior, data, args)
    _predict_once(model, tuned, data, args)
    comparison = _compare(model, prior, tuned, data, args)
    _write(comparison, args)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Figures, pictures and settings are in {args.out}/")
    for name in ("stragglers.png", "request.png", "tuned.png", "figures.csv", "settings.json"):
        print(f"  {args.out / name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.demo",
        description="A network classifies images although some of its workers never reply.",
    )

    def add_number(name: str, default: int, text: str) -> None:
        parser.add_argument(name, type=int, default=default, metavar="n", help=f"{text} (default: %(default)s)")

    add_number("--num-data", 20, "K, images in a request")
    add_number("--num-workers", 60, "N, workers that a request is spread over")
    add_number("--num-stragglers", 20, "S, workers that never reply")
    parser.add_argument(
        "--dataset", choices=datasets.IMAGE_NAMES, default="digits", help="digits, the default, needs no files"
    )
    parser.add_argument("--data-dir", type=Path, help=f"folder with data files (default: ${datasets.VARIABLE})")
    add_number("--batch-size", 400, "test images in a batch")
    add_number("--num-seeds", 12, "batches to average over")
    add_number("--seed", 0, "seed of batches and stragglers")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (default: %(default)s)")
    return parser


def _argument_error(args: argparse.Namespace) -> str | None:
    """Describes the first invalid argument; returns None if all are valid."""
    if args.num_data < 2:
        return f"--num-data must be at least 2, got {args.num_data}"
    if args.num_workers < args.num_data:
        return f"--num-workers must be at least --num-data ({args.num_data}), got {args.num_workers}"
    if not 0 <= args.num_stragglers <= args.num_workers - 2:
        return (
            f"--num-stragglers must be from 0 to --num-workers - 2 ({args.num_workers - 2}), since decoding "
            f"takes two answers, got {args.num_stragglers}"
        )
    if args.num_seeds < 2:
        return f"--num-seeds must be at least 2 for an interval, got {args.num_seeds}"
    if args.seed < 0:
        return f"--seed must not be negative, got {args.seed}"
    return None


def _load(data: Dataset, args: argparse.Namespace) -> nnx.Module:
    name = DEFAULT_NETWORKS[args.dataset]
    print(f"1. {name}, trained on {len(data.x_train):,} images of {args.dataset}.", flush=True)
    model = load_stored(name, data, args.dataset, args.out)
    score = accuracy(model, data.x_test, data.y_test)
    print(f"   {num_parameters(model):,} parameters; accuracy {score:.1%} on {len(data.x_test):,} test images.\n")
    return model


def _distil(model: nnx.Module, data: Dataset, args: argparse.Namespace) -> jc.Surrogate:
    """Distils a surrogate from the network's answers to other training images than those for tuning."""
    images = data.x_train[args.batch_size :][:_SURROGATE_IMAGES]
    print(f"2. Distilling a surrogate from the network's answers to {len(images):,} training images.", flush=True)
    start = time.perf_counter()
    prior = jc.surrogate(model, images, cost=0.13)
    agreement = float(jc.metrics.agreement(prior(data.x_test), model(data.x_test)))
    print(
        f"   It has {prior.cost:.0%} of the network's operations and names its class for {agreement:.1%} of the test "
        f"images ({time.perf_counter() - start:.0f} s).\n",
        flush=True,
    )
    return prior


def _tune(model: nnx.Module, prior: jc.Surrogate, data: Dataset, args: argparse.Namespace) -> jc.tuning.Tuned:
    """Chooses a code for this network on training images."""
    print(
        f"3. Choosing a code on {min(args.batch_size, len(data.x_train))} training images, without their labels.",
        flush=True,
    )
    start = time.perf_counter()
    sample = data.x_train[: args.batch_size]
    stragglers = jc.stragglers.Uniform(args.num_stragglers)
    tuned = jc.tune(
        model,
        sample,
        args.num_data,
        args.num_workers,
        stragglers,
        prior=prior,
        batch_size=args.batch_size,
        loss="disagreement",
    )
    tuned.plot(args.out / "tuned.png")
    best = tuned.candidates[0]
    print(
        f"   Of {len(tuned.candidates)} candidates: {best.layout}; order: {best.order}; {best.prior or 'no prior'} "
        f"({time.perf_counter() - start:.0f} s).\n",
        flush=True,
    )
    return tuned


def _predict_once(model: nnx.Module, tuned: jc.tuning.Tuned, data: Dataset, args: argparse.Namespace) -> None:
    """Predicts one batch by the tuned code, prints the calls and the accuracy, and draws one request."""
    images, labels = jnp.asarray(data.x_test[: args.batch_size]), data.y_test[: args.batch_size]
    key = jax.random.key(args.seed)
    returned = jc.stragglers.Uniform(args.num_stragglers).sample(key, num_workers=args.num_workers)

    predict = tuned.coded(model)
    logits = predict(images, returned)

    coded_accuracy, full_accuracy = (float(jc.metrics.accuracy(y, labels)) for y in (logits, model(images)))
    print(
        f"4. That network behind {args.num_workers} workers, {args.num_stragglers} of which never reply:\n\n"
        f"       late = jc.stragglers.Uniform({args.num_stragglers})\n"
        "       prior = jc.surrogate(model, images)\n"
        f"       tuned = jc.tune(model, sample, {args.num_data}, {args.num_workers}, late, prior=prior,\n"
        f'                       batch_size={args.batch_size}, loss="disagreement")\n'
        "       predict = tuned.coded(model)\n"
        "       logits = predict(images, returned)\n\n"
        f"   Accuracy on {len(images)} images: {coded_accuracy:.1%}; {full_accuracy:.1%} when every worker replies.\n",
        flush=True,
    )
    inputs = images[: args.num_data]
    inputs = inputs[jc.ordering.greedy(inputs, args.num_data)]
    code = jc.SplineCode.chebyshev(num_data=args.num_data, num_workers=args.num_workers)
    coded = code.encode(inputs)
    decoded = jax.nn.softmax(code.decode(model(coded), returned))
    plot_request(
        np.asarray(inputs),
        np.asarray(coded),
        np.asarray(returned),
        np.asarray(decoded),
        np.asarray(jax.nn.softmax(model(inputs))),
        data.class_names,
        args.out / "request.png",
    )


def _compare(
    model: nnx.Module, prior: jc.Surrogate, tuned: jc.tuning.Tuned, data: Dataset, args: argparse.Namespace
) -> Comparison:
    size = args.num_data, args.num_workers
    print(f"5. Every scheme on the same images with the same stragglers, {args.num_seeds} times.", flush=True)
    comparison = compare(
        model,
        data.x_test,
        data.y_test,
        (
            *standard_schemes(*size),
            *filled_schemes(*size),
            *prior_schemes(prior, *size, jc.stragglers.Uniform(args.num_stragglers)),
            tuned_scheme(tuned),
        ),
        _straggler_counts(args.num_stragglers, args.num_workers),
        num_data=args.num_data,
        num_workers=args.num_workers,
        batch_size=args.batch_size,
        num_seeds=args.num_seeds,
        seed=args.seed,
    )
    print(_table(comparison, args))
    print(_summary(comparison, args))
    return comparison


def _straggler_counts(num_stragglers: int, num_workers: int) -> list[int]:
    """Chooses about eight counts from none to twice the given one, which is among them."""
    largest = min(2 * num_stragglers or num_workers // 2, num_workers - 2)
    return sorted({num_stragglers, *(round(largest * i / 8) for i in range(9))})


def _table(comparison: Comparison, args: argparse.Namespace) -> str:
    index = comparison.straggler_counts.index(args.num_stragglers)
    metrics = {
        "accuracy": "accuracy",
        "relative_accuracy": "RelAcc",
        "agreement": "agreement",
        "rmse": "RMSE",
        "lost": "lost",
    }
    intervals = {metric: comparison.interval(metric) for metric in metrics}
    header = f"\n   {'':34}{'decodes':10}" + "".join(f"{title:14}" for title in metrics.values())
    lines = [header.rstrip()]
    for i, scheme in enumerate(comparison.schemes):
        cells = (f"{mean[i, index]:.3f} ±{half_width[i, index]:.3f}" for mean, half_width in intervals.values())
        lines.append(f"   {scheme.label:34}{scheme.output:10}" + "".join(f"{cell:14}" for cell in cells).rstrip())
    base = float(comparison.base_accuracy.mean())
    lines.append(f"   {'every worker replies':44}{base:.3f}")
    footnote = _FOOTNOTE.format(
        num_seeds=args.num_seeds,
        batch=args.batch_size // args.num_data * args.num_data,
        num_data=args.num_data,
        num_stragglers=args.num_stragglers,
    )
    indented = "\n".join(f"   {line}" for line in footnote.splitlines())
    return "\n".join(lines) + f"\n\n{indented}"


def _summary(comparison: Comparison, args: argparse.Namespace) -> str:
    mean, _ = comparison.interval("agreement")
    shares = mean[:, comparison.straggler_counts.index(args.num_stragglers)]
    best = int(shares.argmax())
    share_of = {s.name: share for s, share in zip(comparison.schemes, shares, strict=True)}
    label, share = comparison.schemes[best].label, shares[best]
    return (
        f"\n   While {args.num_stragglers} of {args.num_workers} workers never reply, {share:.1%} of the images "
        f"keep their class ({label});\n"
        f"   {share_of['replication']:.1%} do by replication, {share_of['uncoded']:.1%} uncoded."
    )


def _write(comparison: Comparison, args: argparse.Namespace) -> None:
    write_csv(comparison, args.out / "figures.csv")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "data_dir")}
    settings |= {
        "network": DEFAULT_NETWORKS[args.dataset],
        "straggler_counts": list(comparison.straggler_counts),
        "base_accuracy": float(comparison.base_accuracy.mean()),
        "jax": jax.__version__,
    }
    (args.out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    title = (
        f"{DEFAULT_NETWORKS[args.dataset]} on {args.dataset}: {args.num_data} images coded for {args.num_workers} "
        f"workers (mean and 95 % interval of {args.num_seeds} batches)"
    )
    plot_comparison(comparison, args.num_stragglers, title, args.out / "stragglers.png")


if __name__ == "__main__":
    main()
