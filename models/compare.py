"""Compares every code on a trained network, at several sizes: `python -m models.compare`."""

import argparse
import csv
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

import jaxcode as jc

from . import datasets
from .comparison import (
    Comparison,
    Scheme,
    compare,
    figures,
    filled_schemes,
    standard_schemes,
    surrogate_schemes,
    tuned_scheme,
)
from .datasets import Dataset
from .networks import DEFAULT_NETWORKS, NETWORKS, load_or_train, weights_path
from .plots import save
from .surrogate import PatchSurrogate, distil
from .training import accuracy

Setting = tuple[int, int, int]

_SETTINGS = ((100, 20, 60), (60, 20, 20), (30, 20, 5), (20, 8, 3), (12, 8, 2))
_SURROGATE_IMAGES = 3000
_TITLES = {
    "agreement": "same class as without stragglers",
    "accuracy": "accuracy",
    "rmse": "RMSE of the class probabilities, norm over classes",
}

_FOOTNOTE = """\
Columns are N,K,S. Means over {num_batches} batches of {batch_size} test images and {num_sets} random straggler sets
of each request, with 95 % intervals over batches (Student's t), of one trained network; the same images and sets
for every scheme. Tuned on one other batch of test images. Published codes decode softmax outputs in the
order of the batch. A lost input counts as wrong, and in the RMSE as equal probabilities. Orders and the nearest
images are those of the batch. The surrogate is distilled from the network's answers to up to 3,000 training images."""


def main(argv: Sequence[str] | None = None) -> None:
    """Trains or loads a network, tunes a code for it at every size and compares all schemes.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        data = datasets.load(args.dataset, args.data_dir)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    settings = args.setting or list(_SETTINGS)
    largest = max(num_data for _, num_data, _ in settings)
    if min(args.num_batches, args.num_sets) < 2:
        parser.error("--num-batches and --num-sets must be at least 2")
    if not 2 * largest <= args.batch_size <= len(data.x_test) // 2:
        parser.error(
            f"--batch-size must be from two requests ({2 * largest} images) to half of the {len(data.x_test)} test "
            f"images, got {args.batch_size}"
        )
    start = time.perf_counter()
    name = args.network or DEFAULT_NETWORKS[args.dataset]
    path = args.weights or weights_path(name, args.dataset, args.out)
    model = load_or_train(name, data, args.dataset, path)
    score = accuracy(model, data.x_test, data.y_test)
    print(f"{name} on {args.dataset}: accuracy {score:.1%} on {len(data.x_test):,} test images.\n", flush=True)

    comparisons = {}
    surrogate = distil(model, data.x_train[:_SURROGATE_IMAGES])
    sample = data.x_test[:1000]
    score = jc.metrics.agreement(surrogate(sample), model(sample))
    print(f"Surrogate: agreement {score:.3f} with {name}, {surrogate.cost:.0%} of its multiplications.\n", flush=True)
    for setting in settings:
        comparisons[setting] = _compare(model, surrogate, data, setting, args)
    print(_tables(comparisons, args))
    _write(comparisons, args.out / "figures.csv")
    _plot(comparisons, f"{name} on {args.dataset}", args.out / "loss.png")
    print(f"\nDone in {time.perf_counter() - start:.0f} s. In {args.out}/: figures.csv, loss.png, and for every size")
    print("tuned-N-K-S.txt and tuned-N-K-S.png, the candidates of the tuned code.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.compare",
        description="Compares every code, and one tuned for the network, at several (N, K, S).",
    )

    def add_number(name: str, default: int, text: str) -> None:
        parser.add_argument(name, type=int, default=default, metavar="n", help=f"{text} (default: %(default)s)")

    parser.add_argument(
        "--dataset", choices=datasets.NAMES, default="digits", help="digits, the default, needs no files"
    )
    parser.add_argument("--data-dir", type=Path, help=f"folder with data files (default: ${datasets.VARIABLE})")
    parser.add_argument("--network", choices=sorted(NETWORKS), help="default: resnet20 for cifar10, else lenet5")
    parser.add_argument(
        "--setting",
        type=_setting,
        action="append",
        metavar="N,K,S",
        help="workers, inputs of a request, stragglers; may be given several times (default: "
        + " ".join(",".join(map(str, setting)) for setting in _SETTINGS)
        + ")",
    )
    add_number("--batch-size", 400, "test images in a batch")
    add_number("--num-batches", 5, "batches to average over")
    add_number("--num-sets", 20, "straggler sets for each request of a batch")
    add_number("--seed", 0, "seed of batches and stragglers")
    parser.add_argument(
        "--weights", type=Path, help="safetensors file with the network's weights; written if it does not exist"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/compare"), help="folder to write to (default: %(default)s)"
    )
    return parser


def _setting(text: str) -> Setting:
    try:
        num_workers, num_data, num_stragglers = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected three numbers N,K,S, got {text!r}") from None
    if not 2 <= num_data <= num_workers or not 0 <= num_stragglers <= num_workers - 2:
        raise argparse.ArgumentTypeError(f"expected 2 <= K <= N and 0 <= S <= N - 2, got {text}")
    return num_workers, num_data, num_stragglers


def _compare(
    model: nnx.Module, surrogate: PatchSurrogate, data: Dataset, setting: Setting, args: argparse.Namespace
) -> Comparison:
    """Tunes a code on one batch of test images and compares all schemes on the others."""
    num_workers, num_data, num_stragglers = setting
    print(f"(N, K, S) = {setting}", flush=True)
    stragglers = jc.stragglers.Uniform(num_stragglers)
    sample = data.x_test[: args.batch_size]
    tune = functools.partial(jc.tune, model, sample, num_data, num_workers, stragglers)
    tuned = tune()
    path = args.out / ("tuned-" + "-".join(map(str, setting)))
    path.with_suffix(".txt").write_text(f"{tuned}\n")
    tuned.plot(path.with_suffix(".png"))
    return compare(
        model,
        data.x_test[args.batch_size :],
        data.y_test[args.batch_size :],
        (
            *_schemes(num_data, num_workers, tune),
            *surrogate_schemes(surrogate, num_data, num_workers),
            tuned_scheme(tuned),
        ),
        [num_stragglers],
        num_data=num_data,
        num_workers=num_workers,
        batch_size=args.batch_size,
        num_seeds=args.num_batches,
        num_sets=args.num_sets,
        seed=args.seed,
    )


def _schemes(num_data: int, num_workers: int, tune) -> tuple[Scheme, ...]:
    size = num_data, num_workers
    nested = tune(layouts={"Chebyshev": jc.SplineCode.chebyshev(*size)}, orders={"as given": None})
    order = jc.ordering.greedy
    return (
        *standard_schemes(num_data, num_workers),
        *filled_schemes(num_data, num_workers),
        Scheme("bri", "Floater-Hormann (BRI)", jc.FloaterHormannCode.chebyshev(*size), "softmax"),
        Scheme("bscc", "B-spline (BSCC)", jc.BSplineCode.chebyshev(*size), "softmax"),
        Scheme("lcc", "Lagrange (LCC)", jc.LagrangeCode.chebyshev(*size), "softmax"),
        Scheme("nercc", "two smoothings tuned (NeRCC)", nested.code, tuned_scheme(nested).output),
        Scheme("systematic", "systematic, logits, ordered", jc.SplineCode.systematic(*size), "logits", order),
    )


def _tables(comparisons: dict[Setting, Comparison], args: argparse.Namespace) -> str:
    schemes = next(iter(comparisons.values())).schemes
    header = f"{'':32}" + "".join(f"{','.join(map(str, setting)):>16}" for setting in comparisons)
    parts = []
    for metric, title in _TITLES.items():
        intervals = [comparison.interval(metric) for comparison in comparisons.values()]
        lines = [f"{title}\n{header}"]
        for i, scheme in enumerate(schemes):
            cells = (_cell(mean[i, 0], half_width[i, 0]) for mean, half_width in intervals)
            lines.append(f"{_label(scheme):32}" + "".join(f"{cell:>16}" for cell in cells))
        parts.append("\n".join(lines))
    shares = "".join(f"{_share_of_replication(comparison):>16.0%}" for comparison in comparisons.values())
    parts.append(
        f"Classes lost by the tuned code, as a share of those lost by replication\n{header}\n{'tuned':32}{shares}"
    )
    parts.append(_FOOTNOTE.format(**vars(args)))
    return "\n\n".join(parts)


def _cell(mean: float, half_width: float) -> str:
    digits = 4 if mean < 10 else 0
    return f"{mean:.{digits}f} ±{half_width:.{digits}f}"


def _label(scheme: Scheme) -> str:
    return "uncoded, K workers" if scheme.name == "uncoded" else scheme.label


def _lost_classes(comparison: Comparison, name: str) -> Float[np.ndarray, "batches"]:
    index = [scheme.name for scheme in comparison.schemes].index(name)
    return 1 - comparison.values["agreement"][index, 0]


def _share_of_replication(comparison: Comparison) -> float:
    tuned, replication = (_lost_classes(comparison, name).mean() for name in ("tuned", "replication"))
    return float(tuned / replication) if replication else float("nan")


def _write(comparisons: dict[Setting, Comparison], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("num_workers", "num_data", "num_stragglers", "scheme", "metric", "mean", "low", "high"))
        for (num_workers, num_data, _), comparison in comparisons.items():
            for scheme, num_stragglers, *rest in figures(comparison):
                writer.writerow((num_workers, num_data, num_stragglers, scheme, *rest))


def _plot(comparisons: dict[Setting, Comparison], title: str, path: Path) -> None:
    """Draws the share of classes that each scheme loses, and that of replication as a line."""
    figure = Figure(figsize=(3 * len(comparisons) + 2.5, 5), layout="constrained")
    figure.suptitle(f"{title}: classes lost to stragglers (mean and 95 % interval over batches)")
    panels = figure.subplots(1, len(comparisons), sharey=True, squeeze=False)[0]
    for axes, (setting, comparison) in zip(panels, comparisons.items(), strict=True):
        mean, half_width = comparison.interval("agreement")
        for i, scheme in enumerate(comparison.schemes):
            color = "#0072B2" if scheme.name == "tuned" else "#444444"
            axes.errorbar(max(1 - mean[i, 0], 1e-4), i, xerr=half_width[i, 0], color=color, marker="o", capsize=3)
        axes.axvline(_lost_classes(comparison, "replication").mean(), color="#000000", linestyle="--", linewidth=0.8)
        axes.set(title=f"N, K, S = {', '.join(map(str, setting))}", xlabel="1 - agreement", xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    schemes = next(iter(comparisons.values())).schemes
    panels[0].set_yticks(range(len(schemes)), [_label(scheme) for scheme in schemes])
    panels[0].invert_yaxis()
    save(figure, path)


if __name__ == "__main__":
    main()
