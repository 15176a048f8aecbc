"""Makes the results of E2 to E4, E7 and E8, on networks and images that stand in for the published ones."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from .. import datasets, networks
from ..comparison import Comparison, figures, mean_and_half_width
from ..datasets import Dataset
from ..plots import COLORS, draw_metric, tidy
from ..serialization import num_parameters
from .classifiers import (
    SMOOTHINGS,
    Sensitivity,
    Setting,
    against_stragglers,
    best_smoothings,
    differences,
    gains,
    sensitivity,
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


CASES = (
    Case(
        "LeNet5 on MNIST",
        "lenet5",
        "mnist",
        "weights of our own",
        (_setting(100, 20, 10, 70), _setting(100, 60, 5, 35)),
        (-15, 2),
        (_setting(100, 60, 5, 35), 20),
    ),
    Case(
        "RepVGG (26 million parameters) on CIFAR-10",
        "repvgg_small",
        "cifar10",
        "a small RepVGG that learned from a ResNet-20 too; images perhaps recompressed as JPEG; (60, 40) is ours",
        (_setting(60, 20, 5, 35), _setting(60, 40, 2, 14)),
        (-17, 5),
        (_setting(60, 20, 5, 35), 35),
    ),
    Case(
        "ViT-base (over 80 million parameters) on ImageNet-1K",
        "vit_tiny",
        "cifar10",
        "a small ViT that learned from a ResNet-20 too; CIFAR-10, perhaps recompressed as JPEG; both sizes are ours",
        (_setting(20, 8, 1, 7), _setting(20, 14, 1, 5)),
        (-9, 4),
    ),
)
_LABELS = {
    "mean_error_norm": "mean error norm (published as RMSE)",
    "rmse": "root mean square error",
    "relative_accuracy": "relative accuracy",
}
_BASELINES = {
    "bacc": "BACC",
    "bacc_fixed": "BACC with the signs of all workers",
    "replication": "replication",
    "nearest_of_request": "replication + nearest image of the request",
    "nearest": "replication + nearest image of the batch",
}
_NOTE = """\
LeTCC, BACC, replication and its filling from the request read the K inputs of a request; filling from the batch and the
tuned code, which orders it, read {batch}. An input that replication loses counts as equal probabilities. LeTCC's
smoothings are chosen on training images for all S together, the tuned code for the middle one."""


class Classifiers:
    """Loads networks and measures comparisons, each once.

    Where MNIST is not here, scikit-learn's digits stand in for it; networks for CIFAR-10 are left out where it is not.

    Args:
        is_quick: Measure few and small sizes.
        seed: Seed of batches and stragglers.
    """

    def __init__(self, is_quick: bool, seed: int):
        self._is_quick = is_quick
        self._seed = seed
        self.load_data = functools.cache(datasets.load)
        self._load = functools.cache(self._load_uncached)
        self._compare = functools.cache(self._compare_uncached)

    @functools.cached_property
    def cases(self) -> tuple[Case, ...]:
        """The cases whose images are here."""
        cases = []
        for case in CASES:
            try:
                self.load_data(case.dataset)
            except FileNotFoundError as error:
                print(f"{case.label} is left out: {error}", flush=True)
                if case.dataset == "mnist":
                    difference = "scikit-learn's digits instead of MNIST; weights of our own"
                    cases.append(dataclasses.replace(case, dataset="digits", difference=difference))
            else:
                cases.append(case)
        return tuple(cases)

    def e2(self) -> Result:
        """Measures LeTCC's mean gains over BACC."""
        findings, rows = [], []
        figure = Figure(figsize=(14, 4.2), layout="constrained")
        panels = dict(zip(_LABELS, figure.subplots(1, len(_LABELS), sharey=True), strict=True))
        names = []
        for case in self.cases:
            published = {"mean_error_norm": case.gains[0], "relative_accuracy": case.gains[1]}
            for setting in self._settings(case):
                comparison = self._compare(case, setting)
                for metric, axes in panels.items():
                    gain = gains(comparison, metric)
                    fixed_signs = gains(comparison, metric, baseline="bacc_fixed")
                    tuned = gains(comparison, metric, scheme="tuned", baseline="letcc")
                    axes.errorbar(gain[0], len(names), xerr=gain[1], color=COLORS["letcc"], marker="^", capsize=3)
                    if metric in published:
                        axes.plot(published[metric], len(names), color="#444444", marker="x", markersize=8)
                    sizes = setting.num_workers, setting.num_data
                    rows.append((case.label, *sizes, metric, *gain, *fixed_signs, *tuned))
                    findings.append(
                        Finding(
                            f"{_LABELS[metric]} of LeTCC, beside BACC's: {case.published}, {_sizes(setting)}",
                            f"{published[metric]:+d} %" if metric in published else "",
                            f"{interval(*gain)}; beside BACC with the signs of all workers {interval(*fixed_signs)}; "
                            f"the tuned code, beside LeTCC, {interval(*tuned)}",
                            self._difference(case),
                        )
                    )
                names.append(f"{case.network} {_sizes(setting)}")
        for metric, axes in panels.items():
            axes.axvline(0, color="#bbbbbb", linewidth=0.8)
            axes.set(xlabel="LeTCC's difference from BACC, %", title=_LABELS[metric])
            tidy(axes)
        first = panels["mean_error_norm"]
        first.set_yticks(range(len(names)), names)
        first.invert_yaxis()
        figure.suptitle("triangles: mean over numbers of stragglers, with 95 % intervals; crosses: published")
        columns = ("network", "num_workers", "num_data", "metric", "percent", "half_width", "percent_fixed_signs")
        columns += ("half_width_fixed_signs", "percent_tuned_beside_letcc", "half_width_tuned")
        return Result("E2", "Mean gain of LeTCC over BACC", tuple(findings), columns, rows, figure)

    def e3(self) -> Result:
        """Measures errors against the number of stragglers."""
        return self._curves("E3", "Errors against the number of stragglers", ("mean_error_norm", "rmse"))

    def e4(self) -> Result:
        """Measures relative accuracies against the number of stragglers."""
        metrics = ("relative_accuracy", "accuracy", "agreement", "lost")
        return self._curves("E4", "Relative accuracy against the number of stragglers", metrics)

    def e7(self) -> Result:
        """Searches the best smoothings for each number of stragglers."""
        findings, rows = [], []
        cases = [case for case in self.cases if case.sensitivity]
        figure = Figure(figsize=(5.5 * len(cases), 4.2), layout="constrained")
        for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
            assert case.sensitivity is not None
            setting = self._fewer(case.sensitivity[0])
            options = {"num_images": 2 * setting.num_data, "num_sets": 5} if self._is_quick else {}
            found = best_smoothings(*self._load(case), setting, seed=self._seed, **options)
            for position, name in enumerate(("encoder", "decoder")):
                color, marker = (("#0072B2", "o"), (COLORS["letcc"], "^"))[position]
                values = _exponents(found.pairs[:, position])
                axes.plot(setting.straggler_counts, values, color=color, marker=marker, label=name)
            mean, half_width = mean_and_half_width(100 * found.costs)
            worst = int(mean.argmax())
            findings.append(
                Finding(
                    f"best smoothings, {case.published}, {_sizes(setting)}",
                    "they hardly move with S",
                    f"encoder {_range(found.pairs[:, 0])}, decoder {_range(found.pairs[:, 1])}; one pair for all S "
                    f"({_smoothing(found.common[0])}, {_smoothing(found.common[1])}) costs {mean.mean():+.1f} % on "
                    f"average, and at most {interval(mean[worst], half_width[worst])}, "
                    f"at S = {setting.straggler_counts[worst]}",
                    self._difference(case),
                )
            )
            for i, count in enumerate(setting.straggler_counts):
                sizes = setting.num_workers, setting.num_data, count
                rows.append((case.label, *sizes, *map(float, (*found.pairs[i], mean[i], half_width[i]))))
            _mark_smoothings(axes.yaxis)
            axes.set(xlabel="stragglers S", ylabel="best smoothing", title=f"{case.label}, {_sizes(setting)}")
            axes.legend(frameon=False)
            tidy(axes)
        columns = ("network", "num_workers", "num_data", "num_stragglers", "encoder_smoothing", "decoder_smoothing")
        columns += ("percent_at_common", "half_width")
        return Result("E7", "Best smoothings against the number of stragglers", tuple(findings), columns, rows, figure)

    def e8(self) -> Result:
        """Measures how much worse results are at other smoothings than the best."""
        findings, rows = [], []
        cases = [case for case in self.cases if case.sensitivity]
        figure = Figure(figsize=(11, 4.2 * len(cases)), layout="constrained")
        for panels, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
            assert case.sensitivity is not None
            setting, count = case.sensitivity
            sizes = setting.num_workers, setting.num_data, count
            options = {"num_seeds": 2, "batch_size": setting.num_data} if self._is_quick else {}
            measured = sensitivity(*self._load(case), *sizes, seed=self._seed, **options)
            for position, (axes, name) in enumerate(zip(panels, ("encoder", "decoder"), strict=True)):
                mean, half_width = mean_and_half_width(100 * measured.increases[position])
                _draw_sensitivity(axes, mean, half_width, measured.best[position])
                axes.set_title(f"{case.label}, (N, K, S) = {sizes}, {name}", loc="left", fontsize=10)
                rows += [
                    (case.label, *sizes, name, float(smoothing), float(mean[i]), float(half_width[i]))
                    for i, smoothing in enumerate(SMOOTHINGS)
                ]
                findings.append(
                    Finding(
                        f"mean error norm at ten times the best smoothing of the {name}, {case.published}, {sizes}",
                        "about +3 %",
                        _ten_times_off(measured, position),
                        self._difference(case),
                    )
                )
        columns = ("network", "num_workers", "num_data", "num_stragglers", "part", "smoothing", "percent", "half_width")
        return Result("E8", "What other smoothings than the best cost", tuple(findings), columns, rows, figure)

    def _curves(self, name: str, title: str, metrics: tuple[str, ...]) -> Result:
        """Draws and judges the first of some metrics, and collects the figures of all."""
        metric = metrics[0]
        findings, rows = [], []
        panels = [(case, setting) for case in self.cases for setting in self._settings(case)]
        width = min(2, len(panels))
        plot = Figure(figsize=(6.5 * width, 4 * -(-len(panels) // width) + 0.9), layout="constrained")
        grid = plot.subplots(-(-len(panels) // width), width, squeeze=False)
        for (case, setting), axes in zip(panels, grid.flat, strict=False):
            comparison = self._compare(case, setting)
            draw_metric(axes, comparison, metric)
            _set_limits(axes, comparison, metric)
            base = comparison.base_accuracy.mean()
            axes.set_title(f"{case.label} (accuracy {base:.3f}), {_sizes(setting)}", loc="left", fontsize=10)
            axes.set(xlabel="stragglers S", ylabel=_LABELS[metric])
            sizes = setting.num_workers, setting.num_data
            rows += [(case.label, *sizes, *values) for values in figures(comparison) if values[2] in metrics]
            findings.append(
                Finding(
                    f"{case.published}, {_sizes(setting)}, S from {setting.straggler_counts[0]} "
                    f"to {setting.straggler_counts[-1]}",
                    "LeTCC better than BACC for nearly every S",
                    _wins(comparison, metric),
                    self._difference(case),
                )
            )
        plot.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        columns = ("network", "num_workers", "num_data", "scheme", "num_stragglers", "metric", "mean", "low", "high")
        note = _NOTE.format(batch="two requests" if self._is_quick else "up to 400 images")
        return Result(name, title, tuple(findings), columns, rows, plot, note)

    def _load_uncached(self, case: Case) -> tuple[nnx.Module, Dataset]:
        data = self.load_data(case.dataset)
        path = networks.weights_path(case.network, case.dataset, Path("out/weights"))
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

    def _difference(self, case: Case) -> str:
        """Says how the stand-in differs, and its size."""
        model, _ = self._load(case)
        return f"{case.difference}; {num_parameters(model):,} parameters"


def _sizes(setting: Setting) -> str:
    return f"(N, K) = {setting.num_workers, setting.num_data}"


def _wins(comparison: Comparison, metric: str) -> str:
    """Says for how many numbers of stragglers LeTCC and the tuned code are better and worse than others."""
    parts = []
    for scheme, label, baselines in (
        ("letcc", "LeTCC", list(_BASELINES)),
        ("tuned", "the tuned code", list(_BASELINES)[2:]),
    ):
        texts = []
        for baseline in baselines:
            low, high = differences(comparison, metric, scheme, baseline)
            better, worse = (high, low) if metric == "relative_accuracy" else (low, high)
            texts.append(f"{better} and {worse} ({_BASELINES[baseline]})")
        parts.append(f"{label} better and worse for {', '.join(texts)}")
    return f"of {len(comparison.straggler_counts)} S, beyond chance: {'; '.join(parts)}"


def _set_limits(axes: Axes, comparison: Comparison, metric: str) -> None:
    """Sets the y axis to the range of all schemes but BACC with the signs of all workers, whose poles leave it."""
    mean, _ = comparison.interval(metric)
    others = mean[[scheme.name != "bacc_fixed" for scheme in comparison.schemes]]
    others = others[np.isfinite(others)]
    margin = 0.06 * np.ptp(others)
    axes.set_ylim(max(0.0, others.min() - margin), others.max() + margin)


def _exponents(smoothings):
    """Computes decimal exponents; no smoothing is drawn below the lowest, where its label is."""
    return np.log10(np.maximum(smoothings, SMOOTHINGS[1] / 10))


def _mark_smoothings(axis: Axis) -> None:
    exponents = _exponents(SMOOTHINGS)
    axis.set_ticks(exponents, ["none", *(f"$10^{{{exponent:.0f}}}$" for exponent in exponents[1:])], fontsize=7)


def _smoothing(value: float) -> str:
    return f"{value:.0e}" if value else "none"


def _range(smoothings) -> str:
    low, high = (_smoothing(value) for value in (smoothings.min(), smoothings.max()))
    return f"{low} for every S" if low == high else f"from {low} to {high}"


def _draw_sensitivity(axes: Axes, mean, half_width, best: float) -> None:
    exponents = _exponents(SMOOTHINGS)
    axes.plot(exponents[1:], mean[1:], color="#0072B2", marker="o", markersize=4)
    axes.fill_between(exponents[1:], (mean - half_width)[1:], (mean + half_width)[1:], color="#0072B2", alpha=0.2)
    axes.axhline(mean[0], color="#444444", linestyle="--", linewidth=1, label="no smoothing")
    axes.axvline(_exponents(np.array(best)), color="#bbbbbb", linewidth=5, alpha=0.5, label="best on training images")
    _mark_smoothings(axes.xaxis)
    axes.set(xlabel="smoothing", ylabel="increase of the mean error norm, %")
    # Far from the best the increase is a hundred times higher.
    axes.set_ylim(min(-2, 1.1 * mean.min()), max(25, 1.5 * mean[0]))
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)


def _ten_times_off(measured: Sensitivity, position: int) -> str:
    """Formats the increases at a tenth and at ten times the best positive smoothing, and at none."""
    positive = measured.positive[position]
    index = int(np.flatnonzero(positive == SMOOTHINGS)[0])
    parts = []
    for other, label in ((index - 1, "a tenth"), (index + 1, "ten times"), (0, "none")):
        if 0 <= other < len(SMOOTHINGS) and (other or label == "none"):
            mean, half_width = mean_and_half_width(100 * measured.increases[position][other])
            parts.append(f"{label} {interval(float(mean), float(half_width))}")
    best = "" if measured.best[position] else "best is none; "
    return f"{best}best positive {_smoothing(positive)}; beside it {', '.join(parts)}"
