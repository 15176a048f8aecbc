"""Linear models trained on machines that differ, by every method: ``python -m models.train_linear``."""

import argparse
import csv
import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression

from jaxcode import saga

from .datasets import libsvm

DATASETS = ("breast_cancer", "digits", "a9a", "w8a")
LEVELS = (1e-4, 1e-6, 1e-8)
_STYLES = {
    "distributed SAGA, anchored": ("#D55E00", "-"),
    "distributed SAGA, own": ("#E69F00", "-"),
    "anchored, long samples more often": ("#0072B2", "-"),
    "local SAGA, averaged": ("#CC79A7", "-."),
    "FedAvg": ("#56B4E9", "--"),
    "SCAFFOLD": ("#009E73", "--"),
    "minibatch SGD": ("#000000", ":"),
}
# Steps of SGD and its kin, in units of SAGA's, and by how much of the first their divisor grows in a round.
_LENGTHS = (0.3, 1.0, 3.0, 5.0)
_DECAYS = (0.0, 0.003, 0.03)
_RIVALS = {
    "FedAvg": saga.FederatedAveraging,
    "SCAFFOLD": saga.Scaffold,
    "minibatch SGD": saga.MinibatchSgd,
}
_FOOTNOTE = """\
Samples {lengths}, sorted by label over {machines} machines; {period} steps of one sample each a round, for minibatch
SGD one step of as many samples; one seed. Floats are those that each machine sends. Steps are in units of 1 / (3 L), in
round r; those of SGD and its kin are the best of {tried} epochs. The optimum is scikit-learn's, {least:.12f}."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Samples in order of their labels, and what scikit-learn finds.

    Attributes:
        data: Rows and labels.
        loss: Of one sample.
        params: Zeros.
        least: The objective at scikit-learn's optimum.
    """

    data: tuple[Any, np.ndarray]
    loss: saga.LinearLoss
    params: jax.Array
    least: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A method's way.

    Attributes:
        name: Its own.
        steps: What was chosen for it.
        history: Its suboptimality, among others.
    """

    name: str
    steps: str
    history: saga.History

    def first(self, level: float) -> int | None:
        """The first record at or below a suboptimality."""
        below = np.flatnonzero(self.history.values <= level)
        return int(below[0]) if below.size else None


def main(argv: Sequence[str] | None = None) -> None:
    """Train by every method, print and plot; exits with code 2 on bad arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("ridge", "epochs", "patience"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} is {getattr(args, name)}; expected a number above 0")
    jax.config.update("jax_enable_x64", True)
    try:
        problem = load(args.dataset, args.data_dir, args.ridge, keep_lengths=args.keep_lengths)
        args.out.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        runs = train(problem, args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    text = table(runs, problem.least, args)
    print(text)
    _write(runs, args.out / f"{args.dataset}.csv")
    _plot(runs, args, args.out / f"{args.dataset}.png")
    print(f"\nDone in {time.perf_counter() - start:.0f} s. In {args.out}/: {args.dataset}.csv, {args.dataset}.png")


def load(name: str, data_dir: Path | None, ridge: float, *, keep_lengths: bool = False) -> Problem:
    """Samples in order of their labels, of length 1 unless they keep theirs, and scikit-learn's optimum.

    Raises:
        OSError: If the data set's file is not there.
    """
    if name in ("breast_cancer", "digits"):
        x, y = (load_breast_cancer if name == "breast_cancer" else load_digits)(return_X_y=True)
        x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-9)
        y = np.where(y == 1, 1.0, -1.0) if name == "breast_cancer" else y
    else:
        x, y = libsvm(name, data_dir)
        x = x.toarray()
    if not keep_lengths:
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    order = np.argsort(y, kind="stable")
    x, y = x[order], y[order]
    several = name == "digits"
    # Newton's method for two classes; that of many is the same objective by quasi-Newton.
    solver = {"solver": "lbfgs", "max_iter": 20_000} if several else {"solver": "newton-cholesky", "max_iter": 500}
    model = LogisticRegression(C=1 / (ridge * len(y)), fit_intercept=False, tol=1e-12, **solver).fit(x, y)
    if several:
        coefficients = model.coef_.T
        logits = x @ coefficients
        losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(y)), y]
    else:
        coefficients = model.coef_[0]
        losses = np.logaddexp(0, -y * (x @ coefficients))
    least = float(losses.mean() + ridge / 2 * np.sum(coefficients**2))
    return Problem((x, y), saga.multinomial if several else saga.logistic, jnp.zeros(coefficients.shape), least)


def train(problem: Problem, args: argparse.Namespace) -> list[Run]:
    """Every method from zero; SGD and its kin with the best of several steps, and for longer."""
    runs = []
    settings = {"num_machines": args.machines, "period": args.period, "ridge": args.ridge}
    variants: dict[str, dict[str, Any]] = {
        "distributed SAGA, anchored": {"correction": "anchored"},
        "distributed SAGA, own": {"correction": "own"},
        "local SAGA, averaged": {"correction": "local"},
    }
    if args.keep_lengths:
        variants["anchored, long samples more often"] = {"correction": "anchored", "sampling": "lipschitz"}
    for name, variant in variants.items():
        method = saga.DistributedSaga(problem.loss, **variant, **settings)
        runs.append(_told(Run(name, "1", _run(method, problem, args, args.epochs))))
    unit = float(saga.DistributedSaga(problem.loss, **settings).init(problem.params, problem.data).step_size)
    for name, kind in _RIVALS.items():
        best, steps, least = None, "", np.inf
        for length, decay in itertools.product(_LENGTHS, _DECAYS):
            method = kind(problem.loss, step_size=length * unit, decay=decay, **settings)
            gap = _run(method, problem, args, args.epochs).values[-1]
            if gap < least:
                best, steps, least = method, f"{length:g}" + (f"/(1 + {decay:g} r)" if decay else ""), gap
        runs.append(_told(Run(name, steps, _run(best, problem, args, args.patience * args.epochs))))
    return runs


def _told(run):
    last = run.history
    print(
        f"{run.name}: {last.values[-1]:.1e} after {last.epochs[-1]:.0f} epochs in {last.seconds[-1]:.1f} s", flush=True
    )
    return run


def _run(method, problem, args, epochs):
    per_epoch = max(1, round(len(problem.data[1]) / method.samples_per_round()))
    state = method.init(problem.params, problem.data)
    _, history = method.run(
        state,
        jax.random.key(args.seed),
        epochs * per_epoch,
        every=max(1, per_epoch // 4) if isinstance(method, saga.DistributedSaga) else per_epoch,
        evaluate=lambda params: method.objective(params, state) - problem.least,
        progress=False,
    )
    return history


def table(runs: Sequence[Run], least: float, args: argparse.Namespace) -> str:
    """What it took each method to come so close to the optimum."""
    heads = [f"{level:.0e}" for level in LEVELS]
    lines = [
        "",
        f"{args.dataset}: suboptimality, and epochs and floats until it was reached; - where it never was",
        f"{'method':34} {'step':>16} {'last':>9}"
        + "".join(f"{'epochs to ' + head:>17}" for head in heads)
        + "".join(f"{'floats to ' + head:>17}" for head in heads),
    ]
    for run in runs:
        reached = [run.first(level) for level in LEVELS]
        epochs = ["-" if i is None else f"{run.history.epochs[i]:.1f}" for i in reached]
        floats = ["-" if i is None else f"{run.history.floats[i]:.2e}" for i in reached]
        lines.append(
            f"{run.name:34} {run.steps:>16} {run.history.values[-1]:9.1e}"
            + "".join(f"{cell:>17}" for cell in (*epochs, *floats))
        )
    ours = runs[0].first(1e-6)
    if ours is not None:
        for run in runs:
            if run.name not in _RIVALS:
                continue
            there = run.first(1e-6)
            sent = run.history.floats[-1 if there is None else there]
            times = f"{'more than ' if there is None else ''}{sent / runs[0].history.floats[ours]:.0f} times"
            lines.append(f"{run.name} sends {times} as many floats as anchored SAGA until 1e-06.")
    footnote = _FOOTNOTE.format(
        lengths="as long as they are" if args.keep_lengths else "of length 1",
        machines=args.machines,
        period=args.period,
        tried=f"{len(_LENGTHS) * len(_DECAYS)} after {args.epochs}",
        least=least,
    )
    return "\n".join([*lines, "", footnote])


def _write(runs, path):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "rounds", "epochs", "floats", "suboptimality"])
        for run in runs:
            history = run.history
            for row in zip(history.rounds, history.epochs, history.floats, history.values, strict=True):
                writer.writerow([run.name, *row])


def _plot(runs, args, path):
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    figure.suptitle(
        f"{args.dataset}, sorted by label over {args.machines} machines, {args.period} steps a round, "
        f"ridge {args.ridge:g}"
    )
    for axes, column, label in zip(
        figure.subplots(1, 2, sharey=True), ("epochs", "floats"), ("epochs", "floats sent by each machine"), strict=True
    ):
        for run in runs:
            color, line = _STYLES[run.name]
            # What is below the precision of the objective is noise.
            axes.plot(
                getattr(run.history, column), np.maximum(run.history.values, 1e-14), line, color=color, label=run.name
            )
        axes.set(xlabel=label, xscale="symlog" if column == "epochs" else "log", yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("suboptimality of the objective")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m models.train_linear", description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="breast_cancer", help="default: %(default)s")
    parser.add_argument("--data-dir", type=Path, help="where a9a and w8a are (default: $JAXCODE_DATA)")
    parser.add_argument("--keep-lengths", action="store_true", help="do not make samples as long as each other")
    parser.add_argument("--machines", type=int, default=8, help="K (default: %(default)s)")
    parser.add_argument("--period", type=int, default=64, help="steps in a round (default: %(default)s)")
    parser.add_argument("--ridge", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=30, help="default: %(default)s")
    parser.add_argument(
        "--patience", type=int, default=10, help="how many times as long for SGD and its kin (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/train_linear"), help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main()
