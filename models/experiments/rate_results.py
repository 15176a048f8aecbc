"""Makes the results of E1 and E6, and those of what is proved about rates, from curves."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..plots import COLORS, tidy
from . import rates
from .curves import FUNCTIONS, Curve
from .results import Finding, Result

# What is stated about errors, by the name of the function that measures it: a heading, the bound, and the x axis.
STATEMENTS = {
    "workers": ("No noise, S = 5", "S³ N⁻³", "workers N"),
    "stragglers": ("No noise, N = 240", "S³ N⁻³", "stragglers S"),
    "noise": ("Noise of 0.1, S = 5", "S^(8/5) N^(-3/5)", "workers N"),
    "probability": ("Stragglers with chance 0.1", "log³(N) N⁻³", "workers N"),
    "adversaries 0.3": ("N^0.3 adversaries", "N^(6/5 (a-1))", "workers N"),
    "adversaries 0.5": ("N^0.5 adversaries", "N^(6/5 (a-1))", "workers N"),
    "polynomials 3": ("Cubics, K = 5, N = 20", "LCC exact to S = 7", "stragglers S"),
    "polynomials 15": ("Degree 15, K = 10, N = 20", "LCC never exact", "stragglers S"),
}


# A scheme that is compared with both attacks has one colour.
_COLORS = {"LeTCC": COLORS["letcc"], "LeTCC, unsmoothed": "#000000", "BACC": COLORS["bacc"], "LCC": "#0072B2"}
_COLUMNS = ("statement", "function", "scheme", "trials", "seed", "x", "mean", "low", "high", "median")


def e1(is_quick: bool, seed: int) -> Result:
    """Measures errors against N without noise."""
    curves = rates.workers(seed=seed, **(_FEW if is_quick else {}))
    findings = []
    for spline, berrut in zip(curves[:2], curves[2:], strict=True):
        ratios = ", ".join(
            f"{ratio:.1e} at N = {x:.0f}" for x, ratio in zip(spline.x, spline.mean / berrut.mean, strict=True)
        )
        findings.append(
            Finding(
                f"{spline.function}, S = 5: LeTCC's mean squared error beside BACC's",
                "LeTCC lower and steeper",
                f"{ratios}; slopes {_slope(spline)} and {_slope(berrut)}",
                "inputs are sorted, for both codes",
            )
        )
    return _result("E1", "Errors against the number of workers", curves, findings + _slope_findings(curves))


def e6(is_quick: bool, seed: int) -> Result:
    """Measures Lagrange coding and LeTCC on polynomials; the paper has 20 trials."""
    curves, findings = [], []
    for degree, num_data, published in (
        (3, 5, "LCC exact up to S = 7, LeTCC better beyond"),
        (15, 10, "LeTCC better"),
    ):
        for trials in (20,) if is_quick else (20, 2000):
            both = rates.polynomials(trials, seed, degree=degree, num_data=num_data)
            curves += both
            findings.append(
                Finding(f"{STATEMENTS[both[0].statement][0]}, {trials} trials", published, *_crossing(*both))
            )
    return _result("E6", "Lagrange coding and LeTCC on polynomials", curves, findings)


def theorems(is_quick: bool, seed: int) -> Result:
    """Measures how errors rise with stragglers and fall with N under noise, random stragglers and adversaries."""
    few = _FEW if is_quick else {}
    curves = [
        *rates.stragglers(seed=seed, **({**_FEW, "counts": (5, 20, 80)} if is_quick else {})),
        *rates.noise(seed=seed, **few),
        *rates.probability(seed=seed, **few),
        *(curve for exponent in (0.3, 0.5) for curve in rates.adversaries(seed=seed, exponent=exponent, **few)),
    ]
    return _result("theorems", "Rates that are proved", curves, _slope_findings(curves))


_FEW: dict = {"trials": 100, "counts": (60, 240)}


def _result(name: str, title: str, curves: Sequence[Curve], findings: Sequence[Finding]) -> Result:
    rows = []
    for curve in curves:
        columns = (curve.x, curve.mean, curve.low, curve.high, curve.median)
        for point in zip(*(column.tolist() for column in columns), strict=True):
            rows.append((curve.statement, curve.function, curve.scheme, curve.trials, curve.seed, *point))
    tables = [_slopes(curves)] if any(curve.slope for curve in curves) else []
    lagrange = [i for i, curve in enumerate(curves) if curve.scheme == "LCC"]
    tables += [_errors(curves[i], curves[i + 1]) for i in lagrange]
    return Result(name, title, tuple(findings), _COLUMNS, rows, _plot(curves), "\n\n".join(tables))


_REASONS = {
    "workers": "the bound is for all functions with a square-integrable second derivative: x sin x is smoother, the "
    "other barely has one",
    "stragglers": "random stragglers are seldom adjacent; where they are, errors grow with a higher power of S/N "
    "than 3, so that they lie below the bound and rise faster",
    "noise": "the bound is for the worst function; smoothing is the best by true errors, on the other half of trials",
    "probability": "slopes after division by log³ N; the abstract of 2502.00645 has log⁴(N) N⁻² for LeTCC, which is "
    "weaker",
    "adversaries": "the bound is for the worst adversaries, as those next to an input's node nearly are; smoothing "
    "is the best by true errors, on the other half of trials",
}


def _slope_findings(curves: Sequence[Curve]) -> list[Finding]:
    """Compares LeTCC's slopes of each statement with the bound's, beside BACC's on the same function."""
    findings = []
    for curve in curves:
        if not curve.scheme.startswith("LeTCC") or "unsmoothed" in curve.scheme:
            continue
        heading, bound, label = STATEMENTS[curve.statement]
        attack = curve.scheme.removeprefix("LeTCC")
        (other,) = (
            other
            for other in curves
            if (other.statement, other.function, other.scheme) == (curve.statement, curve.function, "BACC" + attack)
        )
        findings.append(
            Finding(
                f"slope against {label}: {heading}{attack}, {curve.function}",
                f"{bound}: {curve.bound:+.2f}",
                f"{_slope(curve)}; BACC {_slope(other)}",
                _REASONS[curve.statement.split()[0]],
            )
        )
    return findings


def _slope(curve: Curve) -> str:
    assert curve.slope is not None
    slope, low, high = curve.slope
    return f"{slope:.2f} ({low:.2f} to {high:.2f})"


def _crossing(lagrange: Curve, spline: Curve) -> tuple[str, str]:
    """Says up to which S Lagrange coding is exact and from which on LeTCC is better, and why."""
    exact = lagrange.x[np.maximum.accumulate(lagrange.median) < 1e-20]
    texts = [f"LCC's median error is below 1e-20 up to S = {exact[-1]:.0f}" if len(exact) else "LCC is never exact"]
    for name in ("mean", "median"):
        is_worse = getattr(spline, name) >= getattr(lagrange, name)
        first = np.flatnonzero(is_worse)[-1] + 1 if is_worse.any() else 0
        always = (
            f"from S = {lagrange.x[first]:.0f} on" if first < len(is_worse) else f"for no S up to {lagrange.x[-1]:.0f}"
        )
        texts.append(f"LeTCC better by the {name} {always}")
    reason = "random coefficients; rare straggler sets dominate the mean"
    return "; ".join(texts), reason


def _slopes(curves: Sequence[Curve]) -> str:
    """Formats the slopes of all schemes as Markdown."""
    rows = [
        "| statement | bound | of slope | function | scheme | measured slope, 95 % interval | trials, seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        if curve.slope is not None:
            heading, bound, _ = STATEMENTS[curve.statement]
            function = curve.function.replace("|", "\\|")
            rows.append(
                f"| {heading} | {bound} | {curve.bound:.2f} | {function} | {curve.scheme} | {_slope(curve)} "
                f"| {curve.trials}, {curve.seed} |"
            )
    return "\n".join(rows)


def _errors(lagrange: Curve, spline: Curve) -> str:
    """Formats errors on polynomials as Markdown."""
    heading = STATEMENTS[lagrange.statement][0]
    rows = [f"{heading}, {lagrange.trials} trials, seed {lagrange.seed}", ""]
    rows += ["| squared error, S = | " + " | ".join(f"{x:.0f}" for x in lagrange.x) + " |"]
    rows += ["|---" * (1 + len(lagrange.x)) + "|"]
    for curve in (lagrange, spline):
        for name in ("mean", "median"):
            values = getattr(curve, name)
            rows.append(f"| {curve.scheme}, {name} | " + " | ".join(f"{value:.0e}" for value in values) + " |")
    return "\n".join(rows)


def _plot(curves: Sequence[Curve]) -> Figure:
    """Plots a panel for each statement, with 95 % intervals and, dashed grey, lines of the bound's slope."""
    statements = list(dict.fromkeys(curve.statement for curve in curves))
    columns = min(3, len(statements))
    rows = -(-len(statements) // columns)
    figure = Figure(figsize=(5 * columns + 1, 4.2 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for statement, axes in zip(statements, grid, strict=False):
        heading, bound, label = STATEMENTS[statement]
        chosen = [curve for curve in curves if curve.statement == statement]
        if statement.startswith("adversaries"):
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
        tidy(axes)
    for axes in grid:
        axes.remove()
    figure.legend(handles=_keys(curves), loc="outside lower center", ncols=2 if columns < 3 else 4, frameon=False)
    return figure


def _keys(curves: Sequence[Curve]) -> list[Line2D]:
    """Makes the legend's entries for what the curves have."""
    schemes = {curve.scheme.removesuffix(", adjacent").removesuffix(", scattered") for curve in curves}
    keys = [Line2D([], [], color=color, linewidth=3, label=name) for name, color in _COLORS.items() if name in schemes]
    grey = {"color": "#666666", "markersize": 5}
    if any(curve.function == FUNCTIONS[1] for curve in curves):
        keys += [
            Line2D([], [], marker="o", linestyle="-", label="x sin x", **grey),
            Line2D([], [], marker="o", linestyle=":", markerfacecolor="white", label="$|x - x_k|^{1.6}$", **grey),
        ]
    if any(curve.scheme.endswith("adjacent") for curve in curves):
        keys.append(Line2D([], [], marker="s", linestyle="none", label="adjacent stragglers or adversaries", **grey))
    if len({curve.trials for curve in curves if curve.slope is None}) > 1:
        keys.append(Line2D([], [], marker="x", linestyle="none", label="20 trials, as in the paper", **grey))
    return keys


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
