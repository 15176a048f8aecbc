"""Times programs side by side, and reports figures with their limits."""

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

# Seconds that a measurement lasts at least: shorter calls are repeated, so that the clock's resolution and the
# scheduler's pauses are small beside them.
_MIN_DURATION = 2e-3


def time_programs(
    programs: Mapping[str, Callable[[], Any]],
    seconds: float = 6.0,
    rounds: int = 7,
    prepare: Callable[[], Any] | None = None,
) -> dict[str, np.ndarray]:
    """Times programs in rounds, each in another order, so that other load on the machine affects them alike.

    Args:
        programs: Functions of no arguments. Each is called twice before it is timed; a call lasts until its result is
            ready.
        seconds: Rounds continue until this time has passed.
        rounds: The least number of rounds.
        prepare: Called before each call and not timed; calls follow each other immediately if not given.

    Returns:
        The seconds of each program's calls, an array of one entry for each round.
    """
    repeats = {}
    for name, run in programs.items():
        jax.block_until_ready(run())
        repeats[name] = max(1, round(_MIN_DURATION / max(_time(run, 1, prepare), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in programs}
    names, rng, end = list(programs), random.Random(0), time.perf_counter() + seconds
    while len(times[names[0]]) < rounds or time.perf_counter() < end:
        # The state of caches and free memory depends on what ran before.
        rng.shuffle(names)
        for name in names:
            times[name].append(_time(programs[name], repeats[name], prepare))
    return {name: np.asarray(times[name]) for name in programs}


def _time(run, repeats, prepare):
    total = 0.0
    for _ in range(repeats):
        if prepare is not None:
            prepare()
        start = time.perf_counter()
        jax.block_until_ready(run())
        total += time.perf_counter() - start
    return total / repeats


@dataclasses.dataclass(frozen=True)
class Figure:
    """Holds a measured number, its quartiles over rounds, and the limit that it must keep to."""

    name: str
    low: float
    median: float
    high: float
    unit: str = ""
    lower_limit: float | None = None
    upper_limit: float | None = None

    def misses_limit(self) -> bool:
        """Returns whether the limit is missed by more than noise: by the better quartile, too."""
        if self.lower_limit is not None:
            return not self.high >= self.lower_limit
        return self.upper_limit is not None and not self.low <= self.upper_limit

    def format_limit(self) -> str:
        """Formats the limit and how the median compares with it."""
        if self.lower_limit is None and self.upper_limit is None:
            return ""
        if self.lower_limit is not None:
            is_met, limit = self.median >= self.lower_limit, f">= {self.lower_limit:g}"
        else:
            is_met, limit = self.median <= (self.upper_limit or 0.0), f"<= {self.upper_limit:g}"
        return f"{limit:>8} {self.unit:2} {'met' if is_met else 'MISSED' if self.misses_limit() else 'within noise'}"


class Report:
    """Collects the figures of one script: prints each one when it is added, and writes all as JSON at the end."""

    def __init__(self, title: str):
        self.title = title
        self.figures: list[Figure] = []
        self.series: dict[str, Any] = {}
        print(f"\n{title}\n{'':62} {'median':>9}    {'quartiles':>17}      limit", flush=True)

    def add(
        self, name: str, values: Any, unit: str = "", lower_limit: float | None = None, upper_limit: float | None = None
    ):
        """Adds a figure from its values in every round, or one number."""
        low, median, high = (float(q) for q in np.quantile(np.atleast_1d(values), [0.25, 0.5, 0.75]))
        figure = Figure(name, low, median, high, unit, lower_limit, upper_limit)
        self.figures.append(figure)
        spread = f"{_format_number(low):>8} {_format_number(high):>8}" if np.size(values) > 1 else ""
        print(f"{name:62} {_format_number(median):>9} {unit:2} {spread:17} {figure.format_limit()}", flush=True)

    def add_times(self, times: Mapping[str, np.ndarray]):
        """Adds the milliseconds of each program."""
        for name, seconds in times.items():
            self.add(f"  {name}", seconds * 1e3, "ms")

    def finish(self, path: Path | None) -> int:
        """Writes the report to the path if one is given, and returns the exit code: 1 if a limit is missed."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            figures = [dataclasses.asdict(f) | {"missed": f.misses_limit()} for f in self.figures]
            content = {"title": self.title, "machine": describe_machine(), "figures": figures, "series": self.series}
            path.write_text(json.dumps(content, indent=1))
        return int(any(f.misses_limit() for f in self.figures))


def _format_number(value):
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def describe_machine() -> dict[str, Any]:
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


def progress(items, description: str):
    """Makes a progress bar that is erased at the end, so that it does not remain in the table."""
    return tqdm(items, desc=description, leave=False, disable=None)


def run_script(measure: Callable[[Report], None], description: str, cores: int | None = None) -> int:
    """Runs one script: measures, prints, and writes JSON with `--json`.

    With `--cores`, by default as many as `cores` says, all programs are bound to some of the machine's cores.
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
