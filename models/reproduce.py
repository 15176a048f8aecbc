"""Repeats the experiments of the paper: `python -m models.reproduce E1 ... E9 | theorems | all`."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import datasets
from .experiments import coding, rate_results
from .experiments.classifier_results import Classifiers
from .experiments.results import Result, write


def main(argv: Sequence[str] | None = None) -> None:
    """Runs experiments, and writes their figures, plots and findings.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid.
    """
    options = _parser().parse_args(argv)
    experiments = _experiments(options.quick, options.seed)
    names = list(experiments) if "all" in options.experiment else list(dict.fromkeys(options.experiment))
    for name in names:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        result = experiments[name]()
        command = f"python -m models.reproduce {name}{' --quick' if options.quick else ''} --seed {options.seed}"
        print(write(result, options.out, command, time.perf_counter() - start), end="\n\n", flush=True)
    print(f"In {options.out}/: README.md has all findings and plots, the .csv files all figures.")


def _experiments(is_quick: bool, seed: int) -> dict[str, Callable[[], Result]]:
    """Makes the functions that run the experiments, by name; those on classifiers share what they measure."""
    classifiers = Classifiers(is_quick, seed)
    dataset = classifiers.cases[0].dataset
    return {
        "E1": lambda: rate_results.e1(is_quick, seed),
        "E2": classifiers.e2,
        "E3": classifiers.e3,
        "E4": classifiers.e4,
        "E5": lambda: coding.e5(is_quick, seed),
        "E6": lambda: rate_results.e6(is_quick, seed),
        "E7": classifiers.e7,
        "E8": classifiers.e8,
        "E9": lambda: coding.e9(datasets.load(dataset).x_test, dataset),
        "theorems": lambda: rate_results.theorems(is_quick, seed),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.reproduce",
        description="Repeats the experiments of arXiv 2406.00300, and measures the rates that it and others prove. "
        f"Networks are trained on MNIST and CIFAR-10, whose folder {datasets.VARIABLE} names; without it, one on "
        "scikit-learn's digits stands in.",
    )
    names = [*_experiments(True, 0), "all"]
    parser.add_argument("experiment", nargs="+", choices=names, metavar="experiment", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="few and small sizes, in minutes")
    parser.add_argument(
        "--out", type=Path, default=Path("out/reproduce"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
