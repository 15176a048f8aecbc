"""Times contenders side by side, and reports figures with their bars."""

import argparse
import dataclasses
import json
import os
import platform
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

# Shorter runs are repeated until they last as long, or the clock and the scheduler would be what is measured.
_SHORTEST = 2e-3


def race(
    contenders: Mapping[str, Callable[[], Any]],
    seconds: float = 6.0,
    rounds: int = 7,
    between: Callable[[], Any] | None = None,
) -> dict[str, np.ndarray]:
    """Times contenders in rounds, each in another order, so that other load on the machine affects them alike.

    Args:
        contenders: Functions of nothing; each is run twice beforehand, and waited for until its result is ready.
        seconds: Rounds continue until this time has passed.
        rounds: The least number of rounds.
        between: Called before each call and not timed; calls follow each other immediately if not given.

    Returns:
        For each contender its seconds in every round.
    """
    repeats = {}
    for name, run in contenders.items():
        jax.block_until_ready(run())
        repeats[name] = max(1, round(_SHORTEST / max(_time(run, 1, between), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names, rng, end = list(contenders), random.Random(0), time.perf_counter() + seconds
    while len(times[names[0]]) < rounds or time.perf_counter() < end:
        # The state of caches and free memory depends on what ran before.
        rng.shuffle(names)
        for name in names:
            times[name].append(_time(contenders[name], repeats[name], between))
    return {name: np.asarray(times[name]) for name in contenders}


def _time(run, repeats, between):
    total = 0.0
    for _ in range(repeats):
        if between is not None:
            between()
        start = time.perf_counter()
        jax.block_until_ready(run())
        total += time.perf_counter() - start
    return total / repeats


@dataclasses.dataclass(frozen=True)
class Figure:
    """Holds a measured number, its quartiles over rounds, and the bar it must keep to."""

    what: str
    low: float
    median: float
    high: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    def missed(self) -> bool:
        """Returns whether the bar is missed by more than noise: by the better quartile, too."""
        if self.at_least is not None:
            return not self.high >= self.at_least
        return self.at_most is not None and not self.low <= self.at_most

    def verdict(self) -> str:
        """Formats the bar and how the median compares with it."""
        if self.at_least is None and self.at_most is None:
            return ""
        met = self.median >= self.at_least if self.at_least is not None else self.median <= (self.at_most or 0.0)
        bar = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"{bar:>8} {self.unit:2} {'met' if met else 'MISSED' if self.missed() else 'within noise'}"


class Report:
    """Collects the figures of one script: prints each one when it is added, and writes all as JSON at the end."""

    def __init__(self, title: str):
        self.title = title
        self.figures: list[Figure] = []
        self.series: dict[str, Any] = {}
        print(f"\n{title}\n{'':62} {'median':>9}    {'quartiles':>17}        bar", flush=True)

    def add(self, what: str, values: Any, unit: str = "", at_least: float | None = None, at_most: float | None = None):
        """Adds a figure from its values in every round, or one number."""
        low, median, high = (float(q) for q in np.quantile(np.atleast_1d(values), [0.25, 0.5, 0.75]))
        figure = Figure(what, low, median, high, unit, at_least, at_most)
        self.figures.append(figure)
        spread = f"{_number(low):>8} {_number(high):>8}" if np.size(values) > 1 else ""
        print(f"{what:62} {_number(median):>9} {unit:2} {spread:17} {figure.verdict()}", flush=True)

    def times(self, times: Mapping[str, np.ndarray]):
        """Adds what each contender took."""
        for name, seconds in times.items():
            self.add(f"  {name}", seconds * 1e3, "ms")

    def finish(self, path: Path | None) -> int:
        """Writes the report to the path if one is given, and returns the exit code: 1 if a bar is missed."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            figures = [dataclasses.asdict(f) | {"missed": f.missed()} for f in self.figures]
            content = {"title": self.title, "machine": machine(), "figures": figures, "series": self.series}
            path.write_text(json.dumps(content, indent=1))
        return int(any(f.missed() for f in self.figures))


def _number(value):
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def machine() -> dict[str, Any]:
    """Describes the machine that the figures were measured on."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores used": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def progress(items, what: str):
    """Makes a progress bar that leaves nothing behind in the table."""
    return tqdm(items, desc=what, leave=False, disable=None)


def run_script(measure: Callable[[Report], None], description: str, cores: int | None = None) -> int:
    """Runs one script: measures, prints, and writes JSON with `--json`.

    With `--cores`, by default as many as `cores` says, all contenders are bound to some of the machine's cores.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--cores", type=int, help=f"how many of the machine's cores to use (Linux); {cores or 'all'}")
    options = parser.parse_args()
    if not hasattr(os, "sched_setaffinity"):
        if options.cores is not None:
            parser.error("--cores needs Linux")
    elif num_cores := options.cores if options.cores is not None else cores:
        available = sorted(os.sched_getaffinity(0))
        if not 1 <= num_cores <= len(available):
            parser.error(f"--cores is {num_cores}; this machine offers {len(available)}")
        # Threads are made with the first computation.
        os.sched_setaffinity(0, available[:num_cores])
    report = Report(description.splitlines()[0].split(":")[0])
    measure(report)
    return report.finish(options.json)
