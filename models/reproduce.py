"""Repeats the experiments of the paper: `python -m models.reproduce E1 ... E9 | theorems | all`."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import datasets
from .experiments import coding, rate_results
from .experiments.classifier_results import Classifiers
from .experiments.results import Result, write

NAMES = (*(f"E{i}" for i in range(1, 10)), "theorems")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs experiments, and writes their figures, plots and findings.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid, or a file of images is damaged.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    experiments = _experiments(options.quick, options.seed)
    for name in NAMES if "all" in options.experiment else dict.fromkeys(options.experiment):
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        command = f"python -m models.reproduce {name}{' --quick' if options.quick else ''} --seed {options.seed}"
        try:
            findings = write(experiments[name](), options.out, command)
        except (OSError, ValueError, ImportError) as error:
            parser.error(f"{name}: {error}")
        print(f"{findings}\n\n{name} took {time.perf_counter() - start:.0f} s.\n", flush=True)
    print(f"In {options.out}/: README.md has all findings and plots, the .csv files all figures.")


def _experiments(is_quick: bool, seed: int) -> dict[str, Callable[[], Result]]:
    """Makes the functions that run the experiments, by name; those on classifiers share what they measure."""
    classifiers = Classifiers(is_quick, seed)
    functions = (
        lambda: rate_results.e1(is_quick, seed),
        classifiers.e2,
        classifiers.e3,
        classifiers.e4,
        lambda: coding.e5(is_quick, seed),
        lambda: rate_results.e6(is_quick, seed),
        classifiers.e7,
        classifiers.e8,
        lambda: _pictures(classifiers),
        lambda: rate_results.theorems(is_quick, seed),
    )
    return dict(zip(NAMES, functions, strict=True))


def _pictures(classifiers: Classifiers) -> Result:
    dataset = classifiers.cases[0].dataset
    return coding.e9(classifiers.load_data(dataset).x_test, dataset)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.reproduce",
        description="Repeats the experiments of arXiv 2406.00300, and measures the rates that it and others prove. "
        f"Networks are trained on MNIST and CIFAR-10, whose folder {datasets.VARIABLE} names; without it, one on "
        "scikit-learn's digits stands in.",
    )
    names = [*NAMES, "all"]
    parser.add_argument("experiment", nargs="+", choices=names, metavar="experiment", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="few and small sizes, in minutes")
    parser.add_argument("--seed", type=int, default=0, help="seed of batches and stragglers (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/reproduce"), help="folder to write to (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    main()
