"""Reports the result of tuning: the chosen code and all candidates, as a table and as a plot."""

import dataclasses
from pathlib import Path
from typing import Any, final

import numpy as np
from flax import nnx

from .. import _storage
from .._coded import Coded, coded
from ..codes import AbstractCode
from ..functions import Model
from ..ordering import Ordering
from ..outputs import OutputSpace
from ..pools import AbstractPool
from ..serving.server import CodedServer
from ..stop import AbstractStop
from ..stragglers import AbstractStragglers
from ..surrogates import Surrogate
from .smoothing import smoothing_of

__all__ = ["Candidate", "Tuned", "load_tuned"]

_FILE = "tuned.safetensors"


@final
@dataclasses.dataclass(frozen=True)
class Candidate:
    """Holds one combination of code, order and output space, and its loss.

    Attributes:
        layout: Name of the layout.
        order: Name of the order in which a batch is grouped.
        prior: Whether there is a prior, and whether copies are placed by its risks; empty without one.
        code: The code.
        output: In which space answers are decoded.
        loss: Mean loss over straggler sets and groups of inputs; infinite if inputs were lost, where the loss is not
            disagreement.
        half_width: Half the width of the loss's 95 % confidence interval, over both; NaN if it is infinite.
        rmse: Root mean squared error norm of the results, in the unit of the model's answers; infinite if inputs were
            lost.
        work: Of all workers for one group, in runs of the model on one input; the prior's included.
        num_groups: How many groups of inputs it was measured on; fewer than all if it was dropped early.
    """

    layout: str
    order: str
    prior: str
    code: AbstractCode
    output: OutputSpace
    loss: float
    half_width: float
    rmse: float
    work: float
    num_groups: int


@final
@dataclasses.dataclass(frozen=True)
class Tuned:
    """Holds the code that `tune` chose, and the candidates that it chose from.

    Attributes:
        code: The code.
        order: The order in which batches are grouped; None for their own.
        output: In which space answers are decoded.
        prior: The prior; None if none is of use.
        stragglers: Which workers are late, if copies are placed by the prior's risks; else None.
        loss: The loss by which copies are placed.
        candidates: All that were measured: the chosen one first, then those measured on more groups, by their loss.
        num_evaluations: How many inputs, coded or not, the model was run on.
    """

    code: AbstractCode
    order: Ordering | None
    output: OutputSpace
    prior: Surrogate | None
    stragglers: AbstractStragglers | None
    loss: str
    candidates: tuple[Candidate, ...]
    num_evaluations: int

    def coded(self, f: Model) -> Coded:
        """Makes a coded model with the chosen code, order and output space.

        Args:
            f: The model that they were chosen for, or one like it, as `jaxcode.coded` takes it.

        Returns:
            What `jaxcode.coded` returns.

        Raises:
            ValueError: As for `jaxcode.coded`.
        """
        return coded(f, **self.setup())

    def server(self, pool: AbstractPool, stop: AbstractStop, **options: Any) -> CodedServer:
        """Makes a server with the chosen code, order, output space and prior.

        Args:
            pool: The workers that compute the model.
            stop: As for `jaxcode.CodedServer`.
            **options: Its other options, such as time_limit.

        Returns:
            The server.

        Raises:
            TypeError: If options has one that was chosen.
            ValueError: As for `jaxcode.CodedServer`.
        """
        return CodedServer(pool=pool, stop=stop, **self.setup(), **options)

    def setup(self) -> dict[str, Any]:
        """Returns what was chosen, as keyword arguments that `jaxcode.coded` and `jaxcode.CodedServer` share."""
        return {name: getattr(self, name) for name in ("code", "order", "output", "prior", "stragglers", "loss")}

    def save(self, folder: str | Path) -> None:
        """Writes it to `tuned.safetensors` in a folder, from which `jaxcode.load_tuned` reads it.

        Args:
            folder: The folder; made if it does not exist.

        Raises:
            ValueError: If its order or its code is not of jaxcode's own classes.
            OSError: If it cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _storage.save(folder / _FILE, self)

    def table(self) -> str:
        """Formats the candidates as text, one on each line, under a heading."""
        rows = [("layout", "order", "prior", "decodes", "smoothing", "loss", "RMSE", "work", "groups")]
        for c in self.candidates:
            loss = f"{c.loss:.4g} ± {c.half_width:.2g}" if np.isfinite(c.loss) else "inputs lost"
            numbers = _format_smoothing(c.code), loss, f"{c.rmse:.3g}", f"{c.work:.1f}", f"{c.num_groups}"
            rows.append((c.layout, c.order, c.prior, c.output.name, *numbers))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def __str__(self) -> str:
        return (
            f"{self.table()}\nChosen: the first. The model ran on {self.num_evaluations:,} inputs. A lost input counts "
            "as a disagreement if that is the loss, else as infinitely far off. Work: runs of the model for a group."
        )

    def plot(self, path: str | Path | None = None):
        """Draws the candidates' finite losses with their intervals.

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
        num_groups = max(c.num_groups for c in self.candidates)
        shown = [c for c in self.candidates if np.isfinite(c.loss)]
        for row, c in enumerate(shown):
            color = "#0072B2" if row == 0 else "#444444" if c.num_groups == num_groups else "#aaaaaa"
            axes.errorbar(c.loss, row, xerr=c.half_width, color=color, marker="o", markersize=5, capsize=2)
        names = [", ".join(filter(None, (c.layout, c.order, c.prior, c.output.name))) for c in shown]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("loss and 95 % interval\nblue: chosen, gray: dropped early")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
        if path is not None:
            figure.savefig(path, dpi=130, facecolor="white")
        return figure


def load_tuned(folder: str | Path, *, model: nnx.Module | None = None, features: Model | None = None) -> Tuned:
    """Reads what `Tuned.save` wrote.

    Args:
        folder: The folder.
        model: As for `jaxcode.load_surrogate`, if there is a prior.
        features: Likewise.

    Returns:
        The result of tuning, with its candidates.

    Raises:
        ValueError: If the folder holds none, or its prior needs a model or features that are not given.
        OSError: If it cannot be read.
    """
    return _storage.load(Path(folder) / _FILE, Tuned, {"model": model, "features": features})


def _format_smoothing(code):
    """Formats the decoder's smoothing, after the encoder's where that is not zero; nothing for a code without."""
    encoder, decoder = (smoothing_of(code, side) for side in ("encoder", "decoder"))
    if encoder is None and decoder is None:
        return ""
    encoder, decoder = (f"{smoothing:.0e}" if smoothing else "0" for smoothing in (encoder, decoder))
    return decoder if encoder == "0" else f"{encoder}, {decoder}"
