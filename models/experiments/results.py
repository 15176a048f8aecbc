"""Defines the result of an experiment, and writes it: its figures, a plot, and published beside measured findings."""

import csv
import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from matplotlib.figure import Figure

from ..plots import save


@dataclass(frozen=True)
class Finding:
    """Holds a published statement and what was measured.

    Attributes:
        subject: What is compared, with its sizes.
        published: What was published.
        ours: What was measured.
        reason: Why they differ, or which model and data stand in for the published ones.
    """

    subject: str
    published: str
    ours: str
    reason: str


@dataclass(frozen=True)
class Result:
    """Holds what an experiment measured.

    Attributes:
        name: Its short name, such as `E3`, also of its files.
        title: What it measures.
        findings: What was published and what was measured.
        columns: Names of the values.
        rows: The values, to be written as CSV.
        figure: The plot.
        text: Markdown to put under the table of findings.
    """

    name: str
    title: str
    findings: tuple[Finding, ...]
    columns: tuple[str, ...]
    rows: Sequence[tuple]
    figure: Figure
    text: str = ""


def write(result: Result, folder: Path, command: str) -> str:
    """Writes a result's figures as CSV, its plot as PNG and its findings as Markdown, and collects those of all.

    Args:
        result: The result.
        folder: Where to; made if need be. Its `README.md` is made anew from the results that are there.
        command: The command that repeats it.

    Returns:
        The findings, as Markdown.

    Raises:
        ValueError: If the folder has a `README.md` of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    collection = folder / "README.md"
    if collection.exists() and not collection.read_text().startswith(_HEADING):
        raise ValueError(f"{collection} is of something else; name another folder")
    with (folder / f"{result.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(result.columns)
        writer.writerows([_digits(value) for value in row] for row in result.rows)
    save(result.figure, folder / f"{result.name}.png")
    made = f"`{command}`, {datetime.date.today().isoformat()}, {_machine()}"
    parts = [f"## {result.name}. {result.title}", made, _table(result.findings)]
    parts += [result.text.strip()] if result.text else []
    findings = "\n\n".join(parts)
    plot = f"Figures: [{result.name}.csv]({result.name}.csv).\n\n![{result.name}]({result.name}.png)"
    (folder / f"{result.name}.md").write_text(f"{findings}\n\n{plot}\n")
    texts = [path.read_text() for path in sorted(folder.glob("*.md")) if path != collection]
    collection.write_text("\n".join([_HEADING, *(text for text in texts if text.startswith("## "))]))
    return findings


_HEADING = """\
# Published experiments, repeated

Those of arXiv 2406.00300 (E1 to E9), and the rates of errors that it, 2502.00645 and 2502.08058 prove. Intervals are of
95 %. Every scheme of an experiment sees the same images and the same stragglers.
"""


def interval(mean: float, half_width: float, digits: int = 1, unit: str = " %") -> str:
    """Formats a mean and half the width of its interval, with a sign."""
    return f"{mean:+.{digits}f} ± {half_width:.{digits}f}{unit}"


def _table(findings: Sequence[Finding]) -> str:
    rows = ["| what | published | ours | why they differ |", "|---|---|---|---|"]
    for finding in findings:
        cells = (finding.subject, finding.published, finding.ours, finding.reason)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _digits(value):
    return f"{value:.6g}" if isinstance(value, float) else value


def _machine() -> str:
    """Describes the machine: its processor, its devices and the versions that matter."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{len(names)} cores of {names[0]}" if names else cpu
    devices = {device.device_kind for device in jax.devices()}
    return f"{cpu}, devices {', '.join(sorted(devices))}, jax {jax.__version__}, Python {platform.python_version()}"
