"""Trains linear models on machines that differ, by every method: `python -m models.train_linear`."""

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
from tqdm import tqdm

from jaxcode import saga

from .datasets import libsvm

DATASETS = ("breast_cancer", "digits", "a9a", "w8a")
LEVELS = (1e-4, 1e-6, 1e-8)
# The suboptimality for which step sizes are chosen and methods compared.
TARGET = 1e-6
_STYLES = {
    "distributed SAGA, anchored": ("#D55E00", "-"),
    "distributed SAGA, own": ("#E69F00", "--"),
    "distributed SAGA, lipschitz": ("#0072B2", "-"),
    "local SAGA, averaged": ("#CC79A7", "-."),
    "FedAvg": ("#56B4E9", "--"),
    "SCAFFOLD": ("#009E73", "--"),
    "minibatch SGD": ("#000000", ":"),
}
# Step sizes to try, in units of 1 / (3 L); those of round r are divided by 1 + decay r.
_STEP_SIZES = {"saga": (0.1, 0.3, 1.0, 3.0), "sgd": (0.3, 1.0, 3.0, 5.0)}
_DECAYS = {"saga": (0.0,), "sgd": (0.0, 0.01, 0.1)}
_SGD_METHODS = {
    "FedAvg": saga.FederatedAveraging,
    "SCAFFOLD": saga.Scaffold,
    "minibatch SGD": saga.MinibatchSgd,
}
_FOOTNOTE = """\
Samples {lengths}, sorted by label over {machines} machines; {period} steps of one sample each a round, for minibatch
SGD one step of as many samples. Floats are those that each machine sends. Steps are in units of 1 / (3 L), in round r.
Of {saga} step sizes for SAGA, with {epochs} epochs, and {sgd} for the variants of SGD, with up to {longest}, a row
shows the one that reaches {target:.0e} first or comes closest. Rows are of one seed, ratios of {seeds}. The optimum is
scikit-learn's, {minimum:.12f}."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Holds samples in order of their labels, and scikit-learn's optimum.

    Attributes:
        data: Rows and labels.
        loss: The loss of one sample.
        params: The first parameters, zeros.
        minimum: The objective at scikit-learn's optimum.
    """

    data: tuple[Any, np.ndarray]
    loss: saga.LinearLoss
    params: jax.Array
    minimum: float


@dataclasses.dataclass(frozen=True)
class Run:
    """Holds a method's results.

    Attributes:
        name: The method's name.
        steps: The step size that was chosen for it.
        histories: What was recorded with each seed; values are suboptimalities.
    """

    name: str
    steps: str
    histories: tuple[saga.History, ...]

    @property
    def rank(self) -> tuple[float, float]:
        """The floats that it sent until it reached the target with the first seed, and its last suboptimality."""
        history = self.histories[0]
        index = first_record(history, TARGET)
        # Runs that diverge may end with values that are not finite.
        return (np.inf if index is None else history.floats[index]), np.nan_to_num(history.values[-1], nan=np.inf)


def first_record(history: saga.History, level: float) -> int | None:
    """Returns the index of the first record at or below a suboptimality, None if there is none."""
    indices = np.flatnonzero(history.values <= level)
    return int(indices[0]) if indices.size else None


def main(argv: Sequence[str] | None = None) -> None:
    """Trains by every method, prints and plots.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("ridge", "epochs", "patience", "seeds"):
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
    text = table(runs, problem.minimum, args)
    print(text)
    _write(runs, args.out / f"{args.dataset}.csv")
    _plot(runs, args, args.out / f"{args.dataset}.png")
    print(f"\nDone in {time.perf_counter() - start:.0f} s. In {args.out}/: {args.dataset}.csv, {args.dataset}.png")


def load(name: str, data_dir: Path | None, ridge: float, *, keep_lengths: bool = False) -> Problem:
    """Loads samples in order of their labels, scaled to length 1 unless they keep theirs, and finds the optimum.

    Raises:
        OSError: If the data set's file does not exist.
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
    multiclass = name == "digits"
    # Newton's method for two classes, a quasi-Newton method for many; the objective is the same.
    solver = {"solver": "lbfgs", "max_iter": 20_000} if multiclass else {"solver": "newton-cholesky", "max_iter": 500}
    model = LogisticRegression(C=1 / (ridge * len(y)), fit_intercept=False, tol=1e-12, **solver).fit(x, y)
    if multiclass:
        coefficients = model.coef_.T
        logits = x @ coefficients
        losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(y)), y]
    else:
        coefficients = model.coef_[0]
        losses = np.logaddexp(0, -y * (x @ coefficients))
    minimum = float(losses.mean() + ridge / 2 * np.sum(coefficients**2))
    return Problem((x, y), saga.multinomial if multiclass else saga.logistic, jnp.zeros(coefficients.shape), minimum)


def train(problem: Problem, args: argparse.Namespace) -> list[Run]:
    """Trains by every method from zeros, with the best of several step sizes; variants of SGD get more epochs."""
    settings: dict[str, Any] = {"num_machines": args.machines, "period": args.period, "ridge": args.ridge}
    methods: dict[str, Any] = {
        "distributed SAGA, anchored": saga.DistributedSaga(problem.loss, correction="anchored", **settings),
        "distributed SAGA, own": saga.DistributedSaga(problem.loss, correction="own", **settings),
        "local SAGA, averaged": saga.DistributedSaga(problem.loss, correction="local", **settings),
    }
    if args.keep_lengths:
        methods["distributed SAGA, lipschitz"] = saga.DistributedSaga(problem.loss, sampling="lipschitz", **settings)
    methods |= {name: kind(problem.loss, **settings) for name, kind in _SGD_METHODS.items()}
    runs = []
    for name, method in methods.items():
        kind, epochs = ("sgd", args.epochs * args.patience) if name in _SGD_METHODS else ("saga", args.epochs)
        first_state = method.init(problem.params, problem.data)
        trials = []
        for factor, decay in tqdm(
            list(itertools.product(_STEP_SIZES[kind], _DECAYS[kind])), desc=name, unit="step size", leave=False
        ):
            candidate = dataclasses.replace(method, decay=decay) if decay else method
            state = dataclasses.replace(first_state, step_size=factor * first_state.step_size)
            steps = f"{factor:g}" + (f"/(1 + {decay:g} r)" if decay else "")
            trials.append((Run(name, steps, (_run(candidate, state, problem, args, epochs, 0),)), candidate, state))
        best, best_method, best_state = min(trials, key=lambda trial: trial[0].rank)
        histories = [_run(best_method, best_state, problem, args, epochs, i) for i in range(1, args.seeds)]
        runs.append(dataclasses.replace(best, histories=(*best.histories, *histories)))
        history = best.histories[0]
        print(
            f"{name}: {history.values[-1]:.1e} after {history.epochs[-1]:.0f} epochs in {history.seconds[-1]:.1f} s",
            flush=True,
        )
    return runs


def _run(method, state, problem, args, epochs, seed_offset):
    """Trains for a number of epochs, or until the suboptimality is far below all levels."""
    per_epoch = max(1, round(len(problem.data[1]) / method.samples_per_round()))
    try:
        _, history = method.run(
            state,
            jax.random.key(args.seed + seed_offset),
            epochs * per_epoch,
            every=max(1, per_epoch // 4) if isinstance(method, saga.DistributedSaga) else per_epoch,
            evaluate=lambda params: method.objective(params, state) - problem.minimum,
            callbacks=[lambda _, record: record["values"] <= LEVELS[-1] / 100],
            progress=False,
        )
    except saga.DivergenceError as divergence:
        # A step size that is too large has a result, too: its last suboptimality is not finite or large.
        history = divergence.history
    return history


def table(runs: Sequence[Run], minimum: float, args: argparse.Namespace) -> str:
    """Formats the epochs and floats that each method needed for each level of suboptimality."""
    headers = [f"{level:.0e}" for level in LEVELS]
    lines = [
        "",
        f"{args.dataset}: suboptimality, and epochs and floats until a level was reached; - if it never was",
        f"{'method':34} {'step':>16} {'last':>9}"
        + "".join(f"{'epochs to ' + header:>17}" for header in headers)
        + "".join(f"{'floats to ' + header:>17}" for header in headers),
    ]
    for run in runs:
        history = run.histories[0]
        records = [first_record(history, level) for level in LEVELS]
        epochs = ["-" if i is None else f"{history.epochs[i]:.1f}" for i in records]
        floats = ["-" if i is None else f"{history.floats[i]:.2e}" for i in records]
        lines.append(
            f"{run.name:34} {run.steps:>16} {history.values[-1]:9.1e}"
            + "".join(f"{cell:>17}" for cell in (*epochs, *floats))
        )
    anchored_records = [first_record(history, TARGET) for history in runs[0].histories]
    if None not in anchored_records:
        lines.append("")
        anchored_floats = [history.floats[i] for history, i in zip(runs[0].histories, anchored_records, strict=True)]
        lines += [
            f"{run.name} sends {_format_ratio(run, anchored_floats)} as many floats as anchored SAGA."
            for run in runs
            if run.name in _SGD_METHODS
        ]
    num_trials = {kind: len(_STEP_SIZES[kind]) * len(_DECAYS[kind]) for kind in _STEP_SIZES}
    footnote = _FOOTNOTE.format(
        lengths="of their own lengths" if args.keep_lengths else "of length 1",
        machines=args.machines,
        period=args.period,
        epochs=args.epochs,
        longest=args.patience * args.epochs,
        target=TARGET,
        seeds=args.seeds,
        minimum=minimum,
        **num_trials,
    )
    return "\n".join([*lines, "", footnote])


def _format_ratio(run, anchored_floats):
    """Formats the smallest and largest ratio of floats, over seeds, until the target was reached or the run ended."""
    records = [first_record(history, TARGET) for history in run.histories]
    ratios = [
        history.floats[-1 if i is None else i] / floats
        for history, i, floats in zip(run.histories, records, anchored_floats, strict=True)
    ]
    low, high = f"{min(ratios):.2g}", f"{max(ratios):.2g}"
    return f"{'more than ' if None in records else ''}{low if low == high else f'{low} to {high}'} times"


def _write(runs, path):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "rounds", "epochs", "floats", "suboptimality"])
        for run in runs:
            history = run.histories[0]
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
            history = run.histories[0]
            # What is below the precision of the objective is noise.
            axes.plot(getattr(history, column), np.maximum(history.values, 1e-14), line, color=color, label=run.name)
        axes.set(xlabel=label, xscale="symlog" if column == "epochs" else "log", yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("suboptimality of the objective")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m models.train_linear", description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="breast_cancer", help="default: %(default)s")
    parser.add_argument("--data-dir", type=Path, help="folder of a9a and w8a (default: $JAXCODE_DATA)")
    parser.add_argument("--keep-lengths", action="store_true", help="do not scale samples to length 1")
    parser.add_argument("--machines", type=int, default=8, help="K (default: %(default)s)")
    parser.add_argument("--period", type=int, default=64, help="steps in a round (default: %(default)s)")
    parser.add_argument("--ridge", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--patience", type=int, default=10, help="factor of epochs for variants of SGD (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/train_linear"), help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main()
