"""Measures what guesses by a surrogate leave of replication's loss: `python -m models.learning_curve`.

By how many answers it was distilled from, by how many of them passed through a server after it was made, and for inputs
that the network was not trained on.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Shaped
from matplotlib.figure import Figure

import jaxcode as jc

from . import datasets, plots
from .compare import Setting, read_setting
from .networks import DEFAULT_NETWORKS, load_stored
from .training import compute_logits

_SETTINGS = ((30, 20, 5), (20, 8, 3), (12, 8, 2), (10, 8, 1), (12, 10, 1), (60, 20, 20), (100, 20, 60), (9, 8, 1))
_BATCH_SIZE = 400
_PASSING = "then passing answers"
_TRAINING = "the network's training"
# Answers in a request whose answers a learner observes.
_REQUEST = 100
_FOOTNOTE = """\
Loss: the expected share of answers of another class than the network's, over all sets of S late workers, as a multiple
of replication's at the same N, where a lost input counts as wrong; at half of the test inputs, which nothing was
learned from. Every input has a worker of its own, and copies go where the surrogate is least sure
(`jaxcode.allocation`). Behind "=": the multiple of the loss of replication that has as many more workers as the
surrogate costs. Intervals: 95 %, by bootstrap over requests. Expected: the share that the surrogate expects to be of
another class. Cost: operations of the surrogate over the network's."""


@dataclass(frozen=True)
class Row:
    """Holds a surrogate and where it comes from.

    Attributes:
        label: Says what it was learned from.
        count: From how many answers.
        most: How much it may cost, over the network.
        prior: The surrogate.
        seconds: That learning took.
    """

    label: str
    count: int
    most: float
    prior: jc.Surrogate
    seconds: float


@dataclass(frozen=True)
class Loss:
    """Holds the expected losses of requests.

    Attributes:
        guessed: With the surrogate, (requests,).
        replication: Of replication, the mean of all requests.
        same_work: Of replication with as many more workers as the surrogate costs.
    """

    guessed: Float[np.ndarray, "requests"]
    replication: float
    same_work: float

    def format(self) -> str:
        """Formats the multiple of replication's loss, its interval, and that of the same work."""
        rows = np.random.default_rng(0).integers(len(self.guessed), size=(2000, len(self.guessed)))
        half_width = np.ptp(np.quantile(self.guessed[rows].mean(axis=1), (0.025, 0.975))) / 2 / self.replication
        mean = self.guessed.mean()
        return f"{mean / self.replication:.4f} ± {half_width:.4f} = {mean / self.same_work:.4f}"


def expected_loss(
    risk: Float[np.ndarray, "inputs"],
    cost: float,
    is_wrong: Bool[np.ndarray, "inputs"],
    setting: Setting,
    batch_size: int,
) -> Loss:
    """Computes the expected share of wrong classes with copies placed by a surrogate's risks.

    Args:
        risk: That each guess of the surrogate is of another class, as it expects. Whole batches are used.
        cost: Of the surrogate, over the network's.
        is_wrong: Where a guess is of another class than the network's.
        setting: N, K, S.
        batch_size: B, a multiple of K.
    """
    num_workers, num_data, num_late = setting
    stragglers = jc.stragglers.Uniform(num_late)
    lost = jc.allocation.lost_probability(stragglers, num_workers)
    size = len(risk) // batch_size * batch_size
    risks = jnp.asarray(risk[:size]).reshape(-1, batch_size)
    order = jax.vmap(lambda risk: jc.allocation.spread(risk, num_data))(risks)
    order = np.asarray(order) + np.arange(len(order))[:, None] * batch_size
    requests = order.reshape(-1, num_data)
    assignments = jax.vmap(lambda risk: jc.allocation.assign(risk, lost))(jnp.asarray(risk[requests]))
    counts = jax.vmap(lambda assignment: jnp.bincount(assignment, length=num_data))(assignments)
    guessed = np.asarray(jnp.sum(lost[counts] * is_wrong[requests], axis=1)) / num_data

    def of_replication(num_workers):
        lost = jc.allocation.lost_probability(stragglers, num_workers)
        return float(np.mean(lost[np.bincount(np.arange(num_workers) % num_data)]))

    workers = num_workers + cost * num_data
    whole = [of_replication(int(workers)), of_replication(int(workers) + 1)]
    return Loss(guessed, of_replication(num_workers), float(np.interp(workers % 1, (0, 1), whole)))


def distil(
    model: nnx.Module, data: datasets.Dataset, args: argparse.Namespace, apply: Callable[[np.ndarray], np.ndarray]
) -> Iterator[Row]:
    """Learns surrogates in all the ways that are compared."""
    most, *others = args.cost

    def learn(label, inputs, most=most):
        start = time.perf_counter()
        prior = jc.surrogate(model, inputs, cost=most, seed=args.seed)
        return Row(label, len(inputs), most, prior, time.perf_counter() - start)

    first = learn(f"{_TRAINING} {data.noun}", data.x_train[: args.inputs[0]])
    yield first
    for count in args.inputs[1:]:
        yield learn(f"{_TRAINING} {data.noun}", data.x_train[:count])
    for other in others:
        yield learn(f"{_TRAINING} {data.noun}", data.x_train[: args.inputs[-1]], other)
    yield learn(f"{data.noun} it was not trained on", data.x_test[: min(args.inputs[-1], len(data.x_test) // 2)])
    start = time.perf_counter()
    with jc.surrogates.Learner(first.prior, seed=args.seed) as learner:
        total = args.inputs[0]
        for count in args.inputs[1:]:
            for inputs in batches(data.x_train[total:count], _REQUEST):
                learner.observe(inputs, apply(inputs))
                learner.wait()
            total = count
            seconds = time.perf_counter() - start
            yield Row(f"{args.inputs[0]:,}, {_PASSING}", count, most, learner.surrogate, seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Learns surrogates of a network and prints what each leaves of replication's loss.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid.
    """
    parser = _make_parser()
    args = parser.parse_args(argv)
    try:
        data = datasets.load(args.dataset, args.data_dir)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    if sorted(args.inputs) != args.inputs or not 20 <= args.inputs[0] <= args.inputs[-1] <= len(data.x_train):
        parser.error(f"--inputs must be numbers from 20 to {len(data.x_train)}, ascending; got {args.inputs}")
    settings = args.setting or list(_SETTINGS)
    name = args.network or DEFAULT_NETWORKS[args.dataset]
    model = load_stored(name, data, args.dataset, args.out)
    inputs = data.x_test[len(data.x_test) // 2 :]

    def apply(inputs):
        return np.asarray(compute_logits(model, inputs))

    logits = apply(inputs)
    classes = logits.argmax(axis=1)
    print(f"{name} on {args.dataset}, {len(inputs):,} test {data.noun}.\n")
    table, curves, front = [], {}, {}
    for row in distil(model, data, args, apply):
        guesses, risk, squares = (
            np.concatenate(parts)
            for parts in zip(
                *(
                    (*row.prior.with_risk(part, "disagreement"), row.prior.with_risk(part)[1])
                    for part in batches(inputs, 500)
                ),
                strict=True,
            )
        )
        is_wrong = guesses.argmax(axis=1) != classes
        covered = np.mean(np.abs(guesses - logits) <= 1.645 * np.sqrt(squares)[:, None])
        error = np.sqrt(np.mean((guesses - logits) ** 2) / logits.var())
        print(
            f"{row.count:,} answers, {row.label}: learned in {row.seconds:.0f} s, cost {row.prior.cost:.3f}; "
            f"of another class {is_wrong.mean():.4f}, expected {risk.mean():.4f}; RMSE of logits {error:.3f} of their "
            f"standard deviation, {covered:.3f} within 1.645 expected errors",
            flush=True,
        )
        for setting in settings:
            num_data, pair = setting[1], []
            for batch_size in (num_data, max(1, min(_BATCH_SIZE, len(inputs)) // num_data) * num_data):
                loss = expected_loss(risk, row.prior.cost, is_wrong, setting, batch_size)
                pair.append(loss)
                table.append([row.label, row.count, *setting, batch_size, *_numbers(loss, row), is_wrong.mean()])
            single, together = pair
            print(f"  {','.join(map(str, setting)):>10}  B = K: {single.format()}   batches: {together.format()}")
            if setting == settings[0] and row.most == args.cost[0]:
                curves.setdefault(row.label, []).append((row.count, _numbers(single, row)[0]))
            if setting == settings[0] and row.label.startswith(_TRAINING) and row.count == args.inputs[-1]:
                front[row.prior.cost] = _numbers(single, row)
    with (args.out / "figures.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        heads = "learned from", "answers", "N", "K", "S", "B", "multiple of replication's loss", "at the same work"
        writer.writerow([*heads, "cost", "seconds", "of another class"])
        writer.writerows(table)
    if len(front) > 1:
        print(f"\n{'cost':>6} {'seconds':>8} {'loss':>8} {'at the same work':>17}")
        for cost, (multiple, same_work, _, seconds) in sorted(front.items()):
            print(f"{cost:6.3f} {seconds:8.0f} {multiple:8.4f} {same_work:17.4f}")
    _plot(curves, front, f"{name} on {args.dataset}, (N, K, S) = {settings[0]}", args.out / "curve.png")
    print(f"\n{_FOOTNOTE}\nIn {args.out}/: figures.csv, curve.png")


def _numbers(loss, row):
    mean = loss.guessed.mean()
    return mean / loss.replication, mean / loss.same_work, row.prior.cost, row.seconds


def batches(inputs: Shaped[np.ndarray, "inputs ..."], size: int) -> list[Shaped[np.ndarray, "batch ..."]]:
    """Cuts inputs into batches, the last of which may be smaller."""
    return [inputs[start : start + size] for start in range(0, len(inputs), size)]


def _plot(curves, front, title, path):
    """Draws the loss of single requests against the number of answers and, of several costs, against the cost."""
    figure = Figure(figsize=(6 if len(front) < 2 else 10, 4), layout="constrained")
    axes = figure.add_subplot(1, 1 if len(front) < 2 else 2, 1)
    first = next(iter(curves.values()))[:1]
    for (label, points), color in zip(curves.items(), ("#0072B2", "#D55E00", "#009E73"), strict=False):
        points = first + points if label.endswith(_PASSING) else points
        axes.plot(*np.transpose(points), color=color, marker="o", label=label)
    axes.set_xscale("log")
    axes.minorticks_off()
    counts = sorted({count for points in curves.values() for count, _ in points})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_xlabel("answers learned from")
    axes.set_ylabel("loss over replication's, one request at a time")
    every = [axes]
    if len(front) > 1:
        costs, figures = zip(*sorted(front.items()), strict=True)
        every.append(figure.add_subplot(1, 2, 2))
        for column, label, color in ((0, "same workers", "#0072B2"), (1, "same work", "#D55E00")):
            every[1].plot(costs, [row[column] for row in figures], color=color, marker="o", label=label)
        every[1].set_xlabel("cost of the surrogate, over the network's")
    for axes in every:
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        plots.tidy(axes)
    figure.suptitle(title, fontsize=10)
    plots.save(figure, path)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.learning_curve", description=__doc__)
    add = parser.add_argument
    add("--dataset", choices=datasets.NAMES, default="digits", help="inputs (default: %(default)s)")
    add("--network", help="network; that of the stored weights if not given")
    add("--inputs", type=int, nargs="+", default=[400, 1000], metavar="n", help="answers (default: 400 1000)")
    add("--setting", type=read_setting, action="append", metavar="N,K,S", help="workers, inputs, late; may be repeated")
    text = "most that surrogates may cost, over the network; more than one: of the front (default: 0.1)"
    add("--cost", type=float, nargs="+", default=[0.1], metavar="c", help=text)
    add("--seed", type=int, default=0)
    add("--data-dir", help="folder of the data sets; JAXCODE_DATA if not given")
    add("--out", type=Path, default=Path("out/learning_curve"), help="folder to write to (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
