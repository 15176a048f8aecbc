"""Measures every figure of speed, with its limit: `make bench`, or `python -m tests.benchmarks.speed`.

Runs scripts of this folder one after the other, each in a process of its own, whose programs all have the same cores:
one in `training`, all of the machine's in the others, or as many as `--cores` says. Writes their figures to
`speed.json` and a plot of cost against size to `speed.png`. Exits with 1 where a limit is missed by more than noise: by
the better quartile of the rounds, and again when the script is run once more, as a shared machine can be slow for long.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = ("decoder", "wide", "pipeline", "training")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, help=f"which of {', '.join(SCRIPTS)}; all by default")
    parser.add_argument("--cores", type=int, help="use so many of the machine's cores (Linux)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for speed.json and speed.png")
    options = parser.parse_args(argv)
    if unknown := set(options.scripts) - set(SCRIPTS):
        parser.error(f"no script {', '.join(sorted(unknown))}; there are {', '.join(SCRIPTS)}")
    cores = [] if options.cores is None else ["--cores", str(options.cores)]

    reports, failed = {}, False
    for script in options.scripts:
        path = options.out / f"{script}.json"
        command = [sys.executable, "-m", f"tests.benchmarks.{script}", "--json", str(path), *cores]
        path.unlink(missing_ok=True)
        missed = subprocess.run(command).returncode != 0
        if missed and path.exists():
            print(f"\n{script}: a limit is missed; the figures of a second run count", flush=True)
            path.unlink()
            missed = subprocess.run(command).returncode != 0
        failed |= missed
        if path.exists():
            reports[script] = json.loads(path.read_text())
            path.unlink()
    if not reports:
        return 1
    (options.out / "speed.json").write_text(json.dumps(reports, indent=1))
    machine = next(iter(reports.values()))["machine"]
    print("\nmeasured on: " + ", ".join(f"{name} {value}" for name, value in machine.items()))
    plot({k: v for report in reports.values() for k, v in report["series"].items()}, machine, options.out / "speed.png")
    print(f"wrote {options.out / 'speed.json'} and {options.out / 'speed.png'}")
    for report in reports.values():
        for figure in report["figures"]:
            if figure["missed"]:
                print(f"MISSED: {figure['name']}: {figure['median']:.3g} {figure['unit']}")
    return int(failed)


def plot(series, machine, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = {
        "seconds against N": ("workers N (knots)", "a fresh mask: fit 64 columns, evaluate N / 4 points"),
        "seconds against n + p": ("knots and points n + p", "decode 65,536 columns from a fresh mask"),
    }
    names = [name for name in labels if name in series]
    if not names:
        return
    figure, axes = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4.2), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for program, seconds in series[name].items():
            axis.loglog([int(n) for n in seconds], [1e3 * s for s in seconds.values()], "o-", ms=4, label=program)
        axis.set(xlabel=labels[name][0], ylabel="milliseconds", title=labels[name][1])
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{machine['processor']}, {machine['cores used']} cores", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
