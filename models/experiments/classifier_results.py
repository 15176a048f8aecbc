"""Makes the results of E2 to E4, E7 and E8, on networks and images that stand in for the published ones."""

import dataclasses
import functools
import os
from pathlib import Path

import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import datasets, networks
from ..comparison import Comparison, figures, mean_and_half_width
from ..datasets import Dataset
from ..plots import draw_metric, tidy
from .classifiers import (
    SMOOTHINGS,
    Sensitivity,
    Setting,
    against_stragglers,
    gains,
    sensitivity,
    smoothings_against_stragglers,
)
from .results import Finding, Result, interval


@dataclasses.dataclass(frozen=True)
class Case:
    """Holds a network of the paper, what stands in for it, and the sizes.

    Attributes:
        published: The paper's network and images.
        network: The stand-in's name in `networks.NETWORKS`.
        dataset: The images' name.
        difference: How the stand-in differs.
        settings: N, K and numbers of stragglers, of few inputs for each worker and of many.
        gains: Published mean differences of LeTCC from BACC in per cent, of the RMSE and of the relative accuracy.
        sensitivity: The setting and the number of stragglers of E7 and E8; None if the paper has none.
    """

    published: str
    network: str
    dataset: str
    difference: str
    settings: tuple[Setting, ...]
    gains: tuple[int, int]
    sensitivity: tuple[Setting, int] | None = None

    @property
    def label(self) -> str:
        """The stand-in's name and images."""
        return f"{self.network} on {self.dataset}"


def _setting(num_workers: int, num_data: int, step: int, last: int) -> Setting:
    return Setting(num_workers, num_data, tuple(range(step, last + 1, step)))


_LENET5 = Case(
    "LeNet5 on MNIST",
    "lenet5",
    "mnist",
    "the paper's network and images; our weights",
    (_setting(100, 20, 10, 70), _setting(100, 60, 5, 35)),
    (-15, 2),
    (_setting(100, 60, 5, 35), 20),
)
CASES = (
    _LENET5,
    Case(
        "RepVGG (26 M) on CIFAR-10",
        "repvgg_small",
        "cifar10",
        "a RepVGG of 24 million multiplications, on recompressed images (JPEG); (60, 40) is ours",
        (_setting(60, 20, 5, 35), _setting(60, 40, 2, 14)),
        (-17, 5),
        (_setting(60, 20, 5, 35), 35),
    ),
    Case(
        "ViT-base (80 M) on ImageNet-1K",
        "vit_tiny",
        "cifar10",
        "a ViT of 34 million multiplications on CIFAR-10, recompressed (JPEG); both sizes are ours",
        (_setting(20, 8, 1, 7), _setting(20, 14, 1, 5)),
        (-9, 4),
    ),
)
# Where there are no files of images, scikit-learn's digits stand in for MNIST, and the others are left out.
_WITHOUT_DATA = dataclasses.replace(_LENET5, dataset="digits", difference="scikit-learn's digits instead of MNIST")
_METRICS = {"mean_error_norm": "mean norm (the published RMSE)", "relative_accuracy": "relative accuracy"}


class Classifiers:
    """Loads networks and measures comparisons, each once.

    Args:
        is_quick: Measure few and small sizes, in seconds.
        seed: Seed of batches and stragglers.
    """

    def __init__(self, is_quick: bool, seed: int):
        self._is_quick = is_quick
        self._seed = seed
        self.cases = CASES if os.environ.get(datasets.VARIABLE) else (_WITHOUT_DATA,)
        self._load = functools.cache(self._load_uncached)
        self._compare = functools.cache(self._compare_uncached)

    def e2(self) -> Result:
        """Measures LeTCC's mean gains over BACC."""
        findings, rows = [], []
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        names = []
        for case in self.cases:
            for setting in self._settings(case):
                comparison = self._compare(case, setting)
                names.append(f"{case.network} {_sizes(setting)}")
                texts = []
                for axes, metric, published in zip(panels, _METRICS, case.gains, strict=True):
                    fair, fixed, tuned = (
                        gains(comparison, metric, *pair)
                        for pair in (("letcc", "bacc"), ("letcc", "bacc_fixed"), ("tuned", "letcc"))
                    )
                    axes.errorbar(fair[0], len(names) - 1, xerr=fair[1], color="#E69F00", marker="^", capsize=3)
                    axes.plot(published, len(names) - 1, color="#444444", marker="|", markersize=14)
                    rows.append((case.label, *_sizes(setting, as_tuple=True), metric, *fair, *fixed, *tuned, published))
                    texts.append(
                        f"{interval(*fair)}; beside BACC with the signs of all workers {interval(*fixed)}; "
                        f"the tuned code beside LeTCC {interval(*tuned)}"
                    )
                for metric, published, text in zip(("RMSE", "RelAcc"), case.gains, texts, strict=True):
                    subject = f"{metric} of LeTCC beside BACC, {case.published}, {_sizes(setting)}"
                    findings.append(Finding(subject, f"{published:+d} %", text, case.difference))
        for axes, title in zip(panels, _METRICS.values(), strict=True):
            axes.axvline(0, color="#bbbbbb", linewidth=0.8)
            axes.set(xlabel="LeTCC's difference from BACC, %", title=title)
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            tidy(axes)
        figure.suptitle("mean over numbers of stragglers and its 95 % interval; the bar is the published figure")
        columns = ("network", "num_workers", "num_data", "metric", "percent", "half_width", "percent_fixed_signs")
        columns += ("half_width_fixed_signs", "percent_tuned_beside_letcc", "half_width_tuned", "published")
        return Result("E2", "Mean gain of LeTCC over BACC", tuple(findings), columns, rows, figure)

    def e3(self) -> Result:
        """Measures errors against the number of stragglers."""
        return self._curves("E3", "Errors against the number of stragglers", "mean_error_norm")

    def e4(self) -> Result:
        """Measures relative accuracies against the number of stragglers."""
        return self._curves("E4", "Relative accuracy against the number of stragglers", "relative_accuracy")

    def e7(self) -> Result:
        """Searches the best smoothings for each number of stragglers."""
        findings, rows = [], []
        cases = [case for case in self.cases if case.sensitivity]
        figure = Figure(figsize=(5.5 * len(cases), 4.2), layout="constrained")
        for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
            assert case.sensitivity is not None
            setting = self._fewer(case.sensitivity[0])
            model, data = self._load(case)
            images = data.x_train[: 2 * setting.num_data if self._is_quick else 400]
            smoothings = smoothings_against_stragglers(model, images, setting)
            for position, (name, color, marker) in enumerate(
                (("encoder", "#0072B2", "o"), ("decoder", "#E69F00", "^"))
            ):
                axes.plot(
                    setting.straggler_counts,
                    _exponents(smoothings[:, position]),
                    color=color,
                    marker=marker,
                    label=name,
                )
                findings.append(
                    Finding(
                        f"best smoothing of the {name}, {case.published}, {_sizes(setting)}",
                        "hardly moves with S",
                        _range(smoothings[:, position]),
                        case.difference,
                    )
                )
            rows += [
                (case.label, *_sizes(setting, as_tuple=True), count, *pair)
                for count, pair in zip(setting.straggler_counts, smoothings.tolist(), strict=True)
            ]
            _mark_exponents(axes.yaxis)
            axes.set(xlabel="stragglers S", ylabel="best smoothing", title=f"{case.label}, {_sizes(setting)}")
            axes.legend(frameon=False)
            tidy(axes)
        columns = ("network", "num_workers", "num_data", "num_stragglers", "encoder_smoothing", "decoder_smoothing")
        return Result("E7", "Best smoothings against the number of stragglers", tuple(findings), columns, rows, figure)

    def e8(self) -> Result:
        """Measures how much worse results are at other smoothings than the best."""
        findings, rows = [], []
        cases = [case for case in self.cases if case.sensitivity]
        figure = Figure(figsize=(11, 4.2 * len(cases)), layout="constrained")
        for panels, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
            assert case.sensitivity is not None
            setting, count = case.sensitivity
            model, data = self._load(case)
            options = {"num_seeds": 2, "batch_size": setting.num_data} if self._is_quick else {"num_seeds": 20}
            measured = sensitivity(model, data, setting.num_workers, setting.num_data, count, **options)
            sizes = (setting.num_workers, setting.num_data, count)
            for position, (axes, name) in enumerate(zip(panels, ("encoder", "decoder"), strict=True)):
                mean, half_width = mean_and_half_width(100 * measured.increases[position])
                _draw_sensitivity(axes, mean, half_width, measured.best[position])
                axes.set_title(
                    f"{case.label}, (N, K, S) = {sizes}, {name}: best {measured.best[position]:.0e}", fontsize=10
                )
                rows += [
                    (case.label, *sizes, name, float(smoothing), float(mean[i]), float(half_width[i]))
                    for i, smoothing in enumerate(SMOOTHINGS)
                ]
                findings.append(
                    Finding(
                        f"RMSE at ten times the best smoothing of the {name}, {case.published}, {sizes}",
                        "about +3 %",
                        _ten_times_off(measured, position),
                        case.difference,
                    )
                )
        columns = ("network", "num_workers", "num_data", "num_stragglers", "part", "smoothing", "percent", "half_width")
        return Result("E8", "What other smoothings than the best cost", tuple(findings), columns, rows, figure)

    def _curves(self, name: str, title: str, metric: str) -> Result:
        findings, rows = [], []
        panels = [(case, setting) for case in self.cases for setting in self._settings(case)]
        width = min(2, len(panels))
        figure = Figure(figsize=(6.5 * width, 4 * -(-len(panels) // width) + 0.8), layout="constrained")
        grid = figure.subplots(-(-len(panels) // width), width, squeeze=False)
        for axes, (case, setting) in zip(grid.flat, panels, strict=False):
            comparison = self._compare(case, setting)
            draw_metric(axes, comparison, metric)
            _set_limits(axes, comparison, metric)
            base = comparison.base_accuracy.mean()
            axes.set_title(f"{case.label} (accuracy {base:.3f}), {_sizes(setting)}", loc="left", fontsize=10)
            axes.set(xlabel="stragglers S", ylabel=_METRICS[metric])
            rows += [(case.label, *_sizes(setting, as_tuple=True), *figure) for figure in figures(comparison)]
            findings.append(
                Finding(
                    f"{case.published}, {_sizes(setting)}, S from {setting.straggler_counts[0]} "
                    f"to {setting.straggler_counts[-1]}",
                    "LeTCC better than BACC for nearly every S",
                    _wins(comparison, metric),
                    case.difference,
                )
            )
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        columns = ("network", "num_workers", "num_data", "scheme", "num_stragglers", "metric", "mean", "low", "high")
        return Result(name, title, tuple(findings), columns, rows, figure)

    def _load_uncached(self, case: Case) -> tuple[nnx.Module, Dataset]:
        data = datasets.load(case.dataset)
        path = networks.weights_path(case.network, case.dataset, Path("out"))
        return networks.load_or_train(case.network, data, case.dataset, path), data

    def _compare_uncached(self, case: Case, setting: Setting) -> Comparison:
        options = {"num_seeds": 2, "batch_size": 2 * setting.num_data} if self._is_quick else {}
        model, data = self._load(case)
        print(f"{case.label}, {_sizes(setting)}", flush=True)
        return against_stragglers(model, data, setting, seed=self._seed, **options)

    def _settings(self, case: Case) -> tuple[Setting, ...]:
        return (self._fewer(case.settings[0]),) if self._is_quick else case.settings

    def _fewer(self, setting: Setting) -> Setting:
        """Keeps the lowest and the highest number of stragglers if the run is quick."""
        counts = setting.straggler_counts
        return dataclasses.replace(setting, straggler_counts=(counts[0], counts[-1])) if self._is_quick else setting


def _sizes(setting: Setting, as_tuple: bool = False):
    sizes = setting.num_workers, setting.num_data
    return sizes if as_tuple else f"(N, K) = {sizes}"


def _wins(comparison: Comparison, metric: str) -> str:
    """Says for how many numbers of stragglers LeTCC is better than others, by means over repetitions."""
    mean, _ = comparison.interval(metric)
    mean = mean if metric == "relative_accuracy" else -mean
    rows = {scheme.name: mean[i] for i, scheme in enumerate(comparison.schemes)}
    others = {
        "bacc": "BACC",
        "bacc_fixed": "BACC with the signs of all workers",
        "replication": "replication",
        "nearest": "replication filled from the nearest image",
    }
    counts = len(comparison.straggler_counts)
    wins = [f"{int((rows['letcc'] > rows[name]).sum())} of {counts} than {label}" for name, label in others.items()]
    tuned = [f"{int((rows['tuned'] > rows[name]).sum())} than {label}" for name, label in list(others.items())[2:]]
    return f"LeTCC better for {', '.join(wins)}; the tuned code for {', '.join(tuned)}"


def _set_limits(axes: Axes, comparison: Comparison, metric: str) -> None:
    """Sets the y axis to the range of all schemes but BACC with the signs of all workers, whose poles leave it."""
    mean, _ = comparison.interval(metric)
    others = mean[[scheme.name != "bacc_fixed" for scheme in comparison.schemes]]
    margin = 0.06 * (others.max() - others.min())
    axes.set_ylim(max(0.0, others.min() - margin), others.max() + margin)


def _exponents(smoothings):
    """Computes decimal exponents; no smoothing is drawn below the lowest, where its label is."""
    return np.log10(np.maximum(smoothings, SMOOTHINGS[1] / 10))


def _mark_exponents(axis) -> None:
    exponents = _exponents(SMOOTHINGS)
    axis.set_ticks(exponents, ["0", *(f"$10^{{{exponent:.0f}}}$" for exponent in exponents[1:])])


def _range(smoothings) -> str:
    low, high = smoothings.min(), smoothings.max()
    return f"{low:.0e} for every S" if low == high else f"from {low:.0e} to {high:.0e}"


def _draw_sensitivity(axes: Axes, mean, half_width, best: float) -> None:
    exponents = _exponents(SMOOTHINGS)
    axes.plot(exponents[1:], mean[1:], color="#0072B2", marker="o", markersize=4)
    axes.fill_between(exponents[1:], (mean - half_width)[1:], (mean + half_width)[1:], color="#0072B2", alpha=0.2)
    axes.axhline(mean[0], color="#444444", linestyle="--", linewidth=1, label="no smoothing")
    axes.axvline(_exponents(np.array(best)), color="#bbbbbb", linewidth=5, alpha=0.5, label="best, by other images")
    axes.set(xlabel="$\\log_{10}$ of the smoothing", ylabel="RMSE's increase, %")
    # Far from the best the increase is a hundred times higher.
    axes.set_ylim(min(-2, 1.1 * mean.min()), max(25, 1.5 * mean[0]))
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)


def _ten_times_off(measured: Sensitivity, position: int) -> str:
    """Formats the increases at a tenth and at ten times the best positive smoothing, and at none."""
    best = measured.best[position]
    norms = 1 + measured.increases[position]
    index = int(np.flatnonzero(best == SMOOTHINGS)[0]) if best else 1 + int(norms[1:].mean(axis=1).argmin())
    parts = []
    for other, label in ((index - 1, "a tenth"), (index + 1, "ten times"), (0, "none")):
        if 0 <= other < len(SMOOTHINGS) and (other or label == "none"):
            mean, half_width = mean_and_half_width(100 * (norms[other] / norms[index] - 1))
            parts.append(f"{label} {interval(float(mean), float(half_width))}")
    found = "none is best, beside" if not best else "best"
    return f"{found} {SMOOTHINGS[index]:.0e}; {', '.join(parts)}"
