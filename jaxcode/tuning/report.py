"""What tuning found: the chosen code and all that it was chosen from, as a table and as a plot."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen, nnx

from ..coded import Predict, coded
from ..codes import AbstractLinearCode, SplineCode
from ..ordering import Ordering
from ..outputs import OutputSpace


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to code, and how it did.

    Attributes:
        layout: Where its nodes are.
        order: Name of the order in which a batch is cut into groups.
        code: The code.
        output: In which space answers are decoded.
        loss: Mean loss over straggler sets and groups of inputs.
        half_width: Half the width of the loss's 95 % confidence interval, over both.
        rmse: Root mean squared error norm of the results, in the units of the model's answers; a lost input counts as
            if it had been answered by the sample's mean.
        num_groups: How many groups of inputs it was measured on; fewer than others if it was dropped early.
    """

    layout: str
    order: str
    code: AbstractLinearCode
    output: OutputSpace
    loss: float
    half_width: float
    rmse: float
    num_groups: int


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What `tune` chose, and what it chose from.

    Attributes:
        code: The code.
        order: The order in which batches are cut into groups; None for their own.
        output: In which space answers are decoded.
        candidates: All that were measured: the chosen one first, then by how long they stayed in and by their loss.
        num_evaluations: How many inputs, coded or not, the model was run on.
    """

    code: AbstractLinearCode
    order: Ordering | None
    output: OutputSpace
    candidates: tuple[Candidate, ...]
    num_evaluations: int

    def coded(self, f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]]) -> Predict:
        """`jaxcode.coded` with what was chosen, of the model it was chosen for or of one like it."""
        return coded(f, self.code, order=self.order, output=self.output)

    def table(self) -> str:
        """The candidates as text, one a line."""
        rows = [("layout", "order", "decodes", "smoothing", "loss", "RMSE", "groups")]
        for c in self.candidates:
            loss = f"{c.loss:.4f} ± {c.half_width:.4f}"
            rows.append(
                (c.layout, c.order, c.output.name, _smoothing(c.code), loss, f"{c.rmse:.3g}", f"{c.num_groups}")
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def __str__(self) -> str:
        return f"{self.table()}\nChosen: the first. The model ran on {self.num_evaluations:,} inputs."

    def plot(self, path: str | Path | None = None):
        """Draws the candidates' losses with their intervals.

        Args:
            path: Where to save the picture, PNG, SVG or PDF by its name; not saved if not given.

        Returns:
            The matplotlib figure, which a notebook shows.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1.2 + 0.25 * len(self.candidates)), layout="constrained")
        axes = figure.subplots()
        most = max(c.num_groups for c in self.candidates)
        for place, c in enumerate(self.candidates):
            color = "#0072B2" if place == 0 else "#444444" if c.num_groups == most else "#aaaaaa"
            axes.errorbar(c.loss, place, xerr=c.half_width, color=color, marker="o", markersize=5, capsize=2)
        names = [f"{c.layout}, {c.order}, {c.output.name}" for c in self.candidates]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("loss and 95 % interval\nblue: chosen, gray: dropped early")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
        if path is not None:
            figure.savefig(path, dpi=130, facecolor="white")
        return figure


def _smoothing(code):
    if not isinstance(code, SplineCode):
        return ""
    smoothings = (float(np.asarray(s)) for s in (code.encoder_smoothing, code.decoder_smoothing))
    encoder, decoder = (f"{s:.0e}" if s else "0" for s in smoothings)
    return decoder if encoder == "0" else f"{encoder}, {decoder}"
