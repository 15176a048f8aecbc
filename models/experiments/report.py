"""Writes what was measured as CSV, Markdown and PNG."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .curves import FUNCTIONS, Curve

# What is stated about errors, by the name of the function that measures it: a heading, the bound, and the x axis.
STATEMENTS = {
    "workers": ("1. No noise, S = 5", "S³ N⁻³", "workers N"),
    "stragglers": ("2. No noise, N = 240", "S³ N⁻³", "stragglers S"),
    "noise": ("3. Noise of 0.1, S = 5", "S^(8/5) N^(-3/5)", "workers N"),
    "probability": ("4. Stragglers with chance 0.1", "log³(N) N⁻³", "workers N"),
    "liars 0.3": ("5. N^0.3 adversaries", "N^(6/5 (a-1))", "workers N"),
    "liars 0.5": ("5. N^0.5 adversaries", "N^(6/5 (a-1))", "workers N"),
    "polynomials 3": ("6. Cubics, K = 5, N = 20", "LCC exact to S = 7", "stragglers S"),
    "polynomials 15": ("6. Degree 15, K = 10, N = 20", "LCC never exact", "stragglers S"),
}
# Okabe and Ito's colours, as in `models.plots`; a scheme that is compared with both attacks has one colour.
_COLORS = {"LeTCC": "#E69F00", "LeTCC, unsmoothed": "#000000", "BACC": "#CC79A7", "LCC": "#0072B2"}


def write(curves: Iterable[Curve], folder: Path) -> None:
    """Writes `rates.csv`, `rates.png` and `rates.md`.

    Args:
        curves: What `run` returned.
        folder: Where to; made if need be.
    """
    curves = list(curves)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rates.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("statement", "function", "scheme", "trials", "x", "mean", "low", "high", "median"))
        for curve in curves:
            columns = (curve.x, curve.mean, curve.low, curve.high, curve.median)
            for point in zip(*columns, strict=True):
                rows.writerow((curve.statement, curve.function, curve.scheme, curve.trials, *point))
    (folder / "rates.md").write_text(_table(curves))
    _plot(curves).savefig(folder / "rates.png", dpi=130, facecolor="white")


def _table(curves: Sequence[Curve]) -> str:
    """Formats slopes, and the errors on polynomials, as Markdown."""
    rows = [
        "| statement | bound | of slope | function | scheme | measured slope, 95 % interval | trials, seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        if curve.slope is None:
            continue
        heading, bound, _ = STATEMENTS[curve.statement]
        slope, low, high = curve.slope
        function = curve.function.replace("|", "\\|")
        rows.append(
            f"| {heading} | {bound} | {curve.bound:.2f} | {function} | {curve.scheme} "
            f"| {slope:.2f} ({low:.2f} to {high:.2f}) | {curve.trials}, {curve.seed} |"
        )
    for curve in curves:
        if curve.slope is None and curve.scheme == "LCC":
            rows += ["", f"{STATEMENTS[curve.statement][0]}, {curve.trials} trials, seed {curve.seed}", ""]
            rows += ["| mean squared error, S = | " + " | ".join(f"{x:.0f}" for x in curve.x) + " |"]
            rows += ["|---" * (1 + len(curve.x)) + "|"]
        if curve.slope is None:
            for name, values in (("mean", curve.mean), ("median", curve.median)):
                rows.append(f"| {curve.scheme}, {name} | " + " | ".join(f"{value:.0e}" for value in values) + " |")
    return "\n".join(rows) + "\n"


def _plot(curves: Sequence[Curve]) -> Figure:
    """Plots a panel for each statement, with 95 % intervals and, dashed grey, lines of the bound's slope."""
    figure = Figure(figsize=(17, 9), layout="constrained")
    for axes, (statement, (heading, bound, label)) in zip(figure.subplots(2, 4).flat, STATEMENTS.items(), strict=True):
        chosen = [curve for curve in curves if curve.statement == statement]
        if statement.startswith("liars"):
            chosen = [curve for curve in chosen if curve.function == FUNCTIONS[1]]
        most = max(curve.trials for curve in chosen)
        for curve in chosen:
            _plot_curve(axes, curve, is_small=curve.trials < most)
        if chosen[0].bound is not None:
            axes.set_xscale("log")
            axes.set_xticks(chosen[0].x, [f"{x:.0f}" for x in chosen[0].x])
            axes.minorticks_off()
            bound = f"dashed: {bound}"
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel=label, ylabel="mean squared error", yscale="log")
        axes.set_title(f"{heading}\n{bound}", loc="left", fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    keys = [Line2D([], [], color=color, linewidth=3, label=scheme) for scheme, color in _COLORS.items()]
    grey = {"color": "#666666", "markersize": 5}
    keys += [
        Line2D([], [], marker="o", linestyle="-", label="x sin x, or a polynomial", **grey),
        Line2D([], [], marker="o", linestyle=":", markerfacecolor="white", label="$|x - x_k|^{1.6}$", **grey),
        Line2D([], [], marker="s", linestyle="none", label="adjacent stragglers or adversaries", **grey),
        Line2D([], [], marker="x", linestyle="none", label="20 trials, as in the paper", **grey),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _plot_curve(axes: Axes, curve: Curve, is_small: bool) -> None:
    """Plots a curve, marks only where there are few trials, and the bound beside the function that is near it."""
    color = next(color for name, color in sorted(_COLORS.items(), reverse=True) if curve.scheme.startswith(name))
    is_rough = curve.function == FUNCTIONS[1]
    marker = "x" if is_small else "s" if curve.scheme.endswith("adjacent") else "o"
    line = "none" if is_small else ":" if is_rough else "-"
    face = "white" if is_rough else color
    axes.plot(curve.x, curve.mean, color=color, marker=marker, linestyle=line, markersize=5, markerfacecolor=face)
    if not is_small:
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
    if curve.bound is not None and is_rough and color == _COLORS["LeTCC"]:
        bound = curve.x**curve.bound * (np.log(curve.x) ** 3 if curve.statement == "probability" else 1)
        axes.plot(curve.x, bound * curve.mean[0] / bound[0], color="#666666", linestyle="--", linewidth=1)
