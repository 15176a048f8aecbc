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
    prior_schemes,
    standard_schemes,
    tuned_scheme,
)
from .datasets import Dataset
from .networks import DEFAULT_NETWORKS, NETWORKS, load_or_train, stages, weights_path
from .plots import save
from .training import accuracy

Setting = tuple[int, int, int]

_SETTINGS = ((100, 20, 60), (60, 20, 20), (30, 20, 5), (20, 8, 3), (12, 8, 2))
_SURROGATE_INPUTS = 3000
_TITLES = {
    "agreement": "same class as without stragglers",
    "accuracy": "accuracy",
    "relative_accuracy": "accuracy relative to the network's",
    "rmse": "RMSE of the class probabilities, norm over classes",
}

_FOOTNOTE = """\
Columns are N,K,S. Means over {num_batches} batches of {batch_size} test {noun} and {num_sets} random straggler sets
of each request, with 95 % intervals over batches (Student's t), of one trained network; the same {noun} and sets
for every scheme. One request at a time: as many {noun}, of which a scheme sees those of one request only. Tuned on
{batch_size} other test {noun}. Published codes decode softmax outputs in the order of the batch. A lost input counts
as wrong, and in the RMSE as equal probabilities. Orders and the nearest {noun} are those of the batch or request. The
surrogate is distilled from the network's answers to up to 3,000 training {noun}; it takes {cost:.1%} of the network's
operations."""
_FOOTNOTE_OF_TEXTS = """\
Codes that mix are applied after the embedding, which is computed where the texts are: a coded input is a mixture of
embeddings, and workers compute what follows. Orders and distances are those of embeddings."""


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
            f"--batch-size must be from two requests ({2 * largest} inputs) to half of the {len(data.x_test)} test "
            f"{data.noun}, got {args.batch_size}"
        )
    start = time.perf_counter()
    name = args.network or DEFAULT_NETWORKS[args.dataset]
    path = args.weights or weights_path(name, args.dataset, args.out)
    try:
        model = load_or_train(name, data, args.dataset, path)
    except ValueError as error:
        parser.error(str(error))
    score = accuracy(model, data.x_test, data.y_test)
    print(f"{name} on {args.dataset}: accuracy {score:.1%} on {len(data.x_test):,} test {data.noun}.\n", flush=True)

    start_of_prior = time.perf_counter()
    prior = jc.surrogate(model, data.x_train[:_SURROGATE_INPUTS], cost=args.cost)
    seconds = time.perf_counter() - start_of_prior
    sample = data.x_test[:1000]
    score = jc.metrics.agreement(prior(sample), model(sample))
    print(
        f"Surrogate, learned in {seconds:.0f} s: agreement {score:.3f} with {name}, {prior.cost:.1%} of its "
        "operations.\n",
        flush=True,
    )
    comparisons = {}
    for setting in settings:
        for batch_size in (setting[1], args.batch_size):
            comparisons[setting, batch_size] = _compare(model, prior, data, setting, batch_size, args)
    single = {setting: comparison for (setting, size), comparison in comparisons.items() if size == setting[1]}
    together = {setting: comparison for (setting, size), comparison in comparisons.items() if size != setting[1]}
    print("ONE REQUEST AT A TIME (B = K)\n\n" + _tables(single))
    print(f"\nBATCHES OF {args.batch_size} {data.noun.upper()}\n\n" + _tables(together))
    print("\n" + _FOOTNOTE.format(**vars(args) | {"cost": prior.cost, "noun": data.noun}))
    if data.noun == "texts":
        print(_FOOTNOTE_OF_TEXTS)
    _write(comparisons, args.out / "figures.csv")
    _plot(single, together, f"{name} on {args.dataset}", args.out / "loss.png")
    print(f"\nDone in {time.perf_counter() - start:.0f} s. In {args.out}/: figures.csv, loss.png, and for every size")
    print("tuned-N-K-S-B.txt and tuned-N-K-S-B.png, the candidates of the tuned code for batches of B.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.compare",
        description="Compares every code, and one tuned for the network, at several (N, K, S).",
    )

    def add_number(*names: str, default: int, text: str) -> None:
        parser.add_argument(*names, type=int, default=default, metavar="n", help=f"{text} (default: %(default)s)")

    parser.add_argument(
        "--dataset", choices=datasets.NAMES, default="digits", help="digits, the default, and unicode need no files"
    )
    parser.add_argument("--data-dir", type=Path, help=f"folder with data files (default: ${datasets.VARIABLE})")
    parser.add_argument("--network", choices=sorted(NETWORKS), help="default: that of the stored weights")
    parser.add_argument(
        "--setting",
        type=read_setting,
        action="append",
        metavar="N,K,S",
        help="workers, inputs of a request, stragglers; may be given several times (default: "
        + " ".join(",".join(map(str, setting)) for setting in _SETTINGS)
        + ")",
    )
    add_number("--batch-size", "--batch", default=400, text="test inputs in a batch, beside single requests")
    add_number("--num-batches", default=5, text="batches to average over")
    add_number("--num-sets", default=20, text="straggler sets for each request of a batch")
    add_number("--seed", default=0, text="seed of batches and stragglers")
    parser.add_argument(
        "--cost",
        type=float,
        default=0.13,
        help="operations that the surrogate may take, relative to the network's (default: %(default)s)",
    )
    parser.add_argument(
        "--weights", type=Path, help="safetensors file with the network's weights; written if it does not exist"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/compare"), help="folder to write to (default: %(default)s)"
    )
    return parser


def read_setting(text: str) -> Setting:
    """Reads N, K and S from an argument such as 30,20,5."""
    try:
        num_workers, num_data, num_stragglers = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected three numbers N,K,S, got {text!r}") from None
    if not 2 <= num_data <= num_workers or not 0 <= num_stragglers <= num_workers - 2:
        raise argparse.ArgumentTypeError(f"expected 2 <= K <= N and 0 <= S <= N - 2, got {text}")
    return num_workers, num_data, num_stragglers


def _compare(
    model: nnx.Module,
    prior: jc.Surrogate,
    data: Dataset,
    setting: Setting,
    batch_size: int,
    args: argparse.Namespace,
) -> Comparison:
    """Tunes codes on some test inputs, without and with the surrogate, and compares all schemes on the others."""
    num_workers, num_data, num_stragglers = setting
    print(f"(N, K, S) = {setting}, B = {batch_size}", flush=True)
    stragglers = jc.stragglers.Uniform(num_stragglers)
    sample = data.x_test[: args.batch_size]
    sizes, options = (num_data, num_workers, stragglers), {"batch_size": batch_size, "loss": "disagreement"}
    embed, body = stages(model)
    tune = functools.partial(jc.tune, body, embed(sample), *sizes, **options)
    tuned = jc.tune(model, sample, *sizes, prior=prior, **options)
    path = args.out / ("tuned-" + "-".join(map(str, (*setting, batch_size))))
    path.with_suffix(".txt").write_text(f"{tuned}\n")
    tuned.plot(path.with_suffix(".png"))
    return compare(
        model,
        data.x_test[args.batch_size :],
        data.y_test[args.batch_size :],
        (
            *_schemes(num_data, num_workers, tune),
            *prior_schemes(prior, num_data, num_workers, stragglers),
            tuned_scheme(tuned, "tuned_with_prior", "tuned, with surrogate"),
        ),
        [num_stragglers],
        num_data=num_data,
        num_workers=num_workers,
        batch_size=batch_size,
        num_seeds=args.num_batches * (args.batch_size // batch_size),
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
        tuned_scheme(tune()),
    )


def _tables(comparisons: dict[Setting, Comparison]) -> str:
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
    lines = ["classes lost, as a share of those lost by replication", header]
    for i, scheme in enumerate(schemes):
        shares = (_share_of_replication(comparison, i) for comparison in comparisons.values())
        lines.append(f"{_label(scheme):32}" + "".join(f"{share:>16.3f}" for share in shares))
    return "\n\n".join((*parts, "\n".join(lines)))


def _cell(mean: float, half_width: float) -> str:
    digits = 4 if mean < 10 else 0
    return f"{mean:.{digits}f} ±{half_width:.{digits}f}"


def _label(scheme: Scheme) -> str:
    return "uncoded, K workers" if scheme.name == "uncoded" else scheme.label


def _lost_classes(comparison: Comparison, name: str) -> Float[np.ndarray, "batches"]:
    index = [scheme.name for scheme in comparison.schemes].index(name)
    return 1 - comparison.values["agreement"][index, 0]


def _share_of_replication(comparison: Comparison, index: int) -> float:
    lost = 1 - comparison.values["agreement"][index, 0].mean()
    replication = _lost_classes(comparison, "replication").mean()
    return float(lost / replication) if replication else float("nan")


def _write(comparisons: dict[tuple[Setting, int], Comparison], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = "num_workers", "num_data", "num_stragglers", "batch_size", "scheme", "metric", "mean", "low", "high"
        writer.writerow(names)
        for ((num_workers, num_data, _), batch_size), comparison in comparisons.items():
            for scheme, num_stragglers, *rest in figures(comparison):
                writer.writerow((num_workers, num_data, num_stragglers, batch_size, scheme, *rest))


def _plot(single: dict[Setting, Comparison], together: dict[Setting, Comparison], title: str, path: Path) -> None:
    """Draws the share of classes that each scheme loses, and that of replication as a line."""
    figure = Figure(figsize=(3 * len(together) + 2.5, 7), layout="constrained")
    figure.suptitle(f"{title}: classes lost to stragglers (mean and 95 % interval over batches)")
    panels = figure.subplots(1, len(together), sharey=True, squeeze=False)[0]
    for axes, setting in zip(panels, together, strict=True):
        kinds = (("one request at a time", single, "#D55E00", -0.15), ("batches", together, "#0072B2", 0.15))
        for label, comparisons, color, offset in kinds:
            mean, half_width = (values[:, 0] for values in comparisons[setting].interval("agreement"))
            rows = np.arange(len(mean)) + offset
            lost = np.maximum(1 - mean, 1e-4)
            axes.errorbar(lost, rows, xerr=half_width, color=color, marker="o", linestyle="", capsize=3, label=label)
        axes.axvline(_lost_classes(together[setting], "replication").mean(), color="#000000", linestyle="--")
        axes.set(title=f"N, K, S = {', '.join(map(str, setting))}", xlabel="1 - agreement", xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    schemes = next(iter(together.values())).schemes
    panels[0].set_yticks(range(len(schemes)), [_label(scheme) for scheme in schemes])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, path)


if __name__ == "__main__":
    main()
