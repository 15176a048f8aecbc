"""Plots schemes, latencies, and one request."""

import textwrap
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .comparison import Comparison

# Okabe and Ito's palette and two colours of Tol's, distinct in every kind of colour vision; markers repeat that.
_STYLES = {
    "uncoded": ("#7f7f7f", "x", ":"),
    "replication": ("#000000", "s", "--"),
    "nearest": ("#7f7f7f", "D", "--"),
    "nearest_of_request": ("#56B4E9", "d", "--"),
    "bacc": ("#CC79A7", "v", "-"),
    "bacc_fixed": ("#CC79A7", "1", ":"),
    "letcc": ("#E69F00", "^", "-"),
    "logits": ("#56B4E9", "D", "-"),
    "ordered": ("#0072B2", "o", "-"),
    "repeated": ("#009E73", "P", "-"),
    "ridge": ("#882255", "x", "--"),
    "surrogate": ("#332288", "v", "--"),
    "placed": ("#332288", "^", "-"),
    "tuned": ("#D55E00", "*", "-"),
}
COLORS = {name: color for name, (color, _, _) in _STYLES.items()}
_SERVING_STYLES = {
    "uncoded": _STYLES["uncoded"],
    "replication": _STYLES["replication"],
    "hedged replication": ("#CC79A7", "v", "-."),
    "LeTCC, as published": _STYLES["letcc"],
    "ours": _STYLES["tuned"],
}
_MISSING_COLOR = "#D55E00"


def plot_comparison(comparison: Comparison, num_stragglers: int, title: str, path: Path) -> None:
    """Plots accuracy and RMSE against the number of stragglers, with 95 % bands, as PNG.

    Args:
        comparison: The measured schemes.
        num_stragglers: The chosen S, marked in both panels.
        title: Heading of the figure.
        path: The file to write.
    """
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    figure.suptitle(title)
    accuracy_axes, rmse_axes = figure.subplots(1, 2)
    base = float(comparison.base_accuracy.mean())
    accuracy_axes.axhline(base, color="#444444", linewidth=0.8)
    accuracy_axes.annotate(
        "every worker replies",
        (1, base),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#444444",
    )
    panels = ((accuracy_axes, "accuracy", "accuracy"), (rmse_axes, "rmse", "RMSE of the class probabilities"))
    for axes, metric, label in panels:
        draw_metric(axes, comparison, metric)
        axes.axvline(num_stragglers, color="#bbbbbb", linewidth=6, alpha=0.35, zorder=0)
        axes.set(xlabel="workers that never reply", ylabel=label)
    _set_limits(accuracy_axes, comparison, base)
    rmse_axes.set_ylim(bottom=0)
    figure.legend(*accuracy_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def draw_metric(axes: Axes, comparison: Comparison, metric: str) -> None:
    """Draws a metric of every scheme against the number of stragglers: means with 95 % bands.

    Args:
        axes: Where to.
        comparison: The measured schemes.
        metric: A name in `comparison.METRICS`.
    """
    mean, half_width = comparison.interval(metric)
    for i, scheme in enumerate(comparison.schemes):
        color, marker, line = _STYLES.get(scheme.name, ("#999999", ".", ":"))
        style = {"color": color, "marker": marker, "linestyle": line, "markersize": 5, "linewidth": 1.6}
        axes.plot(comparison.straggler_counts, mean[i], label=scheme.label, **style)
        # Bands as wide as their curve is high would hide all others.
        if np.all(half_width[i] <= abs(mean[i])):
            low, high = mean[i] - half_width[i], mean[i] + half_width[i]
            axes.fill_between(comparison.straggler_counts, low, high, color=color, alpha=0.2, linewidth=0)
    tidy(axes)


def tidy(axes: Axes) -> None:
    """Draws a faint grid, and no frame at the top and the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_latency(latency: dict[str, Float[np.ndarray, "requests"]], title: str, path: Path) -> None:
    """Plots the share of requests that take longer than a time, against the time, as PNG.

    Args:
        latency: Seconds that requests took, by scheme.
        title: Heading of the figure.
        path: The file to write.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for label, seconds in latency.items():
        color, marker, line = _SERVING_STYLES[label]
        shares = 1 - np.arange(1, len(seconds) + 1) / (len(seconds) + 1)
        axes.plot(1000 * np.sort(seconds), shares, color=color, linestyle=line, label=label, linewidth=1.6)
        index = np.searchsorted(-shares, -0.01)
        axes.plot(1000 * np.sort(seconds)[index : index + 1], shares[index : index + 1], color=color, marker=marker)
    axes.axhline(0.01, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.annotate("p99", (1, 0.01), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right")
    axes.set(xscale="log", yscale="log", xlabel="milliseconds", ylabel="share of requests that take longer")
    _title(axes, title, 7)
    tidy(axes)
    axes.legend(frameon=False)
    save(figure, path)


def plot_request(
    inputs: Float[np.ndarray, "K height width channels"],
    coded: Float[np.ndarray, "N height width channels"],
    returned: Bool[np.ndarray, "N"],
    decoded: Float[np.ndarray, "K classes"],
    targets: Float[np.ndarray, "K classes"],
    class_names: tuple[str, ...],
    path: Path,
) -> None:
    """Plots one request as PNG: inputs, coded inputs, missing workers, decoded probabilities.

    Args:
        inputs: The K inputs, in their order on the curve, values in [0, 1].
        coded: The N coded inputs.
        returned: Which workers replied.
        decoded: Class probabilities decoded from those.
        targets: The model's class probabilities without coding.
        class_names: The name of each class.
        path: The file to write.
    """
    num_data, num_workers = len(inputs), len(coded)
    rows = -(-num_workers // num_data)
    width = min(24.0, max(6.0, 0.62 * num_data))
    cell = width / num_data
    figure = Figure(figsize=(width, cell * (1 + rows) + 3.6), layout="constrained")
    heights = (cell, cell * rows, 2.0)
    input_axes, coded_axes, class_axes = figure.subplots(3, 1, height_ratios=heights)

    draw_mosaic(input_axes, inputs, 1, num_data)
    _title(input_axes, f"{num_data} inputs, ordered so that similar ones are neighbours", width)
    draw_mosaic(coded_axes, coded, rows, num_data)
    _cross_out(coded_axes, np.flatnonzero(~returned), rows, inputs.shape[1])
    missing = int(np.sum(~returned))
    _title(
        coded_axes,
        f"coded inputs of the {num_workers} workers: points of a smooth curve through the inputs, column by column; "
        f"{missing} never reply",
        width,
    )
    num_equal = _plot_classes(class_axes, decoded, targets, class_names)
    _title(
        class_axes,
        f"class probabilities decoded from the {num_workers - missing} answers: "
        f"{num_equal} of {num_data} classes as without stragglers",
        width,
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(figure, path)


def draw_mosaic(axes: Axes, images: Float[np.ndarray, "images height width channels"], rows: int, columns: int) -> None:
    """Draws images in a grid, column by column, with blanks at the end; values are cut to [0, 1]."""
    count, height, width, channels = images.shape
    is_gray = channels == 1
    tiles = np.full((columns * rows, height, width, channels), 0.0 if is_gray else 1.0)
    tiles[:count] = np.clip(images, 0, 1)
    tiles = tiles.reshape(columns, rows, height, width, channels).transpose(1, 2, 0, 3, 4)
    tiles = tiles.reshape(rows * height, columns * width, channels)
    axes.imshow(tiles[..., 0] if is_gray else tiles, cmap="gray_r", vmin=0, vmax=1, aspect="auto")
    for edge in range(1, columns):
        axes.axvline(edge * width - 0.5, color="#cccccc", linewidth=0.6)
    for edge in range(1, rows):
        axes.axhline(edge * height - 0.5, color="#cccccc", linewidth=0.6)
    axes.set_xticks([])
    axes.set_yticks([])


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    # A figure made without pyplot needs no display and need not be closed.
    figure.savefig(path, dpi=130, facecolor="white")


def _cross_out(axes: Axes, workers: Int[np.ndarray, "missing"], rows: int, size: int) -> None:
    """Draws crosses over the images of some workers in a mosaic of square images of a size."""
    for worker in workers:
        column, row = divmod(int(worker), rows)
        x, y = column * size - 0.5, row * size - 0.5
        axes.fill([x, x + size, x + size, x], [y, y, y + size, y + size], color="white", alpha=0.55, linewidth=0)
        for ends in ((y, y + size), (y + size, y)):
            axes.plot((x, x + size), ends, color=_MISSING_COLOR, linewidth=1.6)


def _plot_classes(
    axes: Axes,
    decoded: Float[np.ndarray, "K classes"],
    targets: Float[np.ndarray, "K classes"],
    class_names: tuple[str, ...],
) -> int:
    """Plots decoded class probabilities with rings at the model's classes; returns how many classes are the same."""
    # Colors end at the middle of the palette, so that rings are visible on the darkest.
    axes.imshow(decoded.T, cmap="Blues", vmin=0, vmax=1.7, aspect="auto")
    classes, expected = decoded.argmax(axis=-1), targets.argmax(axis=-1)
    is_same, columns = classes == expected, np.arange(len(decoded))
    ring = {"marker": "o", "facecolors": "none", "s": 60, "linewidths": 1.6}
    label = "class the model gives, decoded"
    axes.scatter(columns[is_same], expected[is_same], edgecolors="black", label=label, **ring)
    if not is_same.all():
        axes.scatter(
            columns[~is_same], expected[~is_same], edgecolors=_MISSING_COLOR, label=f"{label} as another", **ring
        )
    axes.set_yticks(range(len(class_names)), class_names, fontsize=8)
    axes.set_xticks([])
    return int(is_same.sum())


def _set_limits(axes: Axes, comparison: Comparison, base: float) -> None:
    """Sets the y axis to the range of all schemes but the uncoded one, whose line may leave the panel."""
    mean, _ = comparison.interval("accuracy")
    others = [i for i, scheme in enumerate(comparison.schemes) if scheme.name != "uncoded"]
    lowest = float(mean[others].min()) if others else 0.0
    axes.set_ylim(max(0.0, lowest - 0.08 * (base - lowest) - 0.005), base + 0.08 * (base - lowest) + 0.005)


def _title(axes: Axes, text: str, width: float) -> None:
    """Sets a heading at the left, broken into lines for a figure of this width in inches."""
    axes.set_title(textwrap.fill(text, int(11 * width)), loc="left", fontsize=11)
