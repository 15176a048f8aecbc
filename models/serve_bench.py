"""Measures latency and accuracy of serving from processes with random delays: `python -m models.serve_bench`."""

import argparse
import csv
import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

import jaxcode as jc

from . import datasets
from .networks import DEFAULT_NETWORKS, IMAGE_NETWORKS, load_or_train, weights_path
from .plots import plot_latency
from .training import predicted_classes

_QUANTILES = (0.5, 0.9, 0.99, 0.999)
# Quantiles of a delay: after which a share is assigned to another worker, and after which our scheme waits no longer.
_HEDGE_QUANTILE, _DEADLINE_QUANTILE = 0.95, 0.995

_FOOTNOTE = """\
{num_requests:,} requests of {batch_size} test images each, {clients} concurrently; the same images for every scheme.
{num_workers} worker processes, which sleep before each answer: {law}, at most {longest:g} s.
Latency in milliseconds, from the call to the results. A share is assigned to any worker that is free: the
{num_data} images of each group uncoded, {num_workers} copies or coded inputs else. Hedged and ours assign to
another worker what has no answer after {hedge:.0f} ms, the 95 % quantile of a delay. LeTCC waits for {num_answers}
answers. Ours waits until every image's predicted error is at most {tolerance:g} (of its logits), and no longer
than {deadline:.0f} ms, the 99.5 % quantile of a delay. Agreement: the same class as that of the uncoded network."""


@dataclasses.dataclass(frozen=True)
class Delays:
    """Delays a worker before it computes, by draws from a law with a heavy tail.

    Attributes:
        law: "pareto" or "lognormal".
        scale: The shortest delay of a Pareto law, the median of a lognormal one, in seconds.
        tail: The Pareto law's tail index, smaller is heavier; the standard deviation of a lognormal delay's logarithm.
        longest: Longest delay, to which longer draws are cut, in seconds.
        seed: Seed of the draws; each worker has a stream of its own.
    """

    law: str
    scale: float
    tail: float
    longest: float
    seed: int

    def __call__(self, worker, compute, batch):
        """Sleeps, then computes."""
        # This object is sent to the worker's process, where the streams stay.
        stream = _STREAMS.setdefault((worker, self), np.random.default_rng((self.seed, worker)))
        time.sleep(float(self.draw(stream, 1)[0]))
        return compute(batch)

    def draw(self, rng: np.random.Generator, count: int) -> Float[np.ndarray, "count"]:
        """Draws delays, in seconds."""
        if self.law == "pareto":
            seconds = self.scale * (1 + rng.pareto(self.tail, count))
        else:
            seconds = self.scale * np.exp(self.tail * rng.normal(size=count))
        return np.minimum(seconds, self.longest)

    def model(self) -> jc.stragglers.AbstractLatency:
        """Returns the same law for use under jit, not cut."""
        if self.law == "pareto":
            return jc.stragglers.Pareto(self.scale, self.tail)
        return jc.stragglers.LogNormal(self.scale, self.tail)

    def quantile(self, probability: float) -> float:
        """Estimates the quantile of the delays, in seconds, to about one per cent."""
        return float(np.quantile(self.draw(np.random.default_rng(0), 1_000_000), probability))

    def __str__(self) -> str:
        milliseconds = f"{1000 * self.scale:g} ms"
        if self.law == "pareto":
            return f"Pareto with minimum {milliseconds} and tail index {self.tail:g}"
        return f"lognormal with median {milliseconds} and sigma {self.tail:g}"


# Random streams of this process, by worker and delays.
_STREAMS: dict = {}
# Default tails, by law.
_TAILS = {"pareto": 1.5, "lognormal": 1.0}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Holds the measurements of one scheme.

    Attributes:
        label: Name of the scheme.
        latency: Seconds from call to results, shape (requests,).
        seconds: From the first call to the last result.
        classes: The class of every image, shape (requests, batch); -1 where there was no result.
        answers: How many workers' answers were used, shape (requests,).
    """

    label: str
    latency: Float[np.ndarray, " requests"]
    seconds: float
    classes: Int[np.ndarray, "requests batch"]
    answers: Int[np.ndarray, " requests"]


def main(argv: Sequence[str] | None = None) -> None:
    """Trains or loads a network, tunes a code, starts workers and sends the requests by every scheme.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if min(args.num_requests, args.clients) < 1:
        parser.error("--num-requests and --clients must be at least 1")
    if not 2 <= args.num_data <= args.num_answers <= args.num_workers:
        parser.error("expected 2 <= --num-data <= --num-answers <= --num-workers")
    try:
        data = datasets.load(args.dataset, args.data_dir)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    if not 2 * args.num_data <= args.batch_size <= len(data.x_test) or args.batch_size % args.num_data:
        parser.error(f"--batch-size must be a multiple of --num-data, from 2 of them to the {len(data.x_test)} images")
    tail = _TAILS[args.delays] if args.tail is None else args.tail
    delays = Delays(args.delays, args.delay / 1000, tail, args.longest, args.seed)

    start = time.perf_counter()
    name = args.network or DEFAULT_NETWORKS[args.dataset]
    path = args.weights or weights_path(name, args.dataset, args.out)
    model = load_or_train(name, data, args.dataset, path)
    reference = predicted_classes(model, data.x_test)
    accuracy = np.mean(reference == data.y_test)
    print(f"{name} on {args.dataset}: accuracy {accuracy:.1%} on test images.", flush=True)
    sample = data.x_train[: max(200, args.batch_size)]
    stragglers = jc.stragglers.Deadline(delays.model(), delays.quantile(_DEADLINE_QUANTILE))
    num_groups = max(1, args.batch_size // args.num_data)
    options = {"batch_size": num_groups * args.num_data, "loss": "disagreement"}
    tuned = jc.tune(model, sample, args.num_data, args.num_workers, stragglers, **options)
    print(f"Tuned code: {tuned.candidates[0].layout}.", flush=True)

    rng = np.random.default_rng(args.seed)
    batches = [rng.choice(len(data.x_test), args.batch_size, replace=False) for _ in range(args.num_requests)]
    with jc.pools.RayPool(model, args.num_workers, interceptor=delays) as pool:
        servers = _servers(pool, tuned, delays, args)
        for server in servers.values():
            server.warm_up(sample[: args.batch_size])
        outcomes = [_measure(label, server, data.x_test, batches, args.clients) for label, server in servers.items()]

    table = _table(outcomes, reference[np.stack(batches)], data.y_test[np.stack(batches)])
    hedge, deadline = (1000 * delays.quantile(probability) for probability in (_HEDGE_QUANTILE, _DEADLINE_QUANTILE))
    footnote = _FOOTNOTE.format(**vars(args), law=delays, hedge=hedge, deadline=deadline)
    print(f"\n{table}\n\n{footnote}")
    _write(outcomes, args.out / "latency.csv")
    plot_latency(
        {outcome.label: outcome.latency for outcome in outcomes},
        f"{args.num_workers} workers, {args.num_data} inputs each group; delays: {delays}",
        args.out / "latency.png",
    )
    print(f"\nDone in {time.perf_counter() - start:.0f} s. In {args.out}/: latency.png and latency.csv.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.serve_bench",
        description="Measures latency and accuracy of coded and uncoded serving by processes with random delays.",
    )

    def add_number(name: str, default: float, text: str, kind: type = int) -> None:
        parser.add_argument(name, type=kind, default=default, metavar="n", help=f"{text} (default: %(default)s)")

    parser.add_argument(
        "--dataset", choices=datasets.IMAGE_NAMES, default="digits", help="digits, the default, needs no files"
    )
    parser.add_argument("--data-dir", type=Path, help=f"folder with data files (default: ${datasets.VARIABLE})")
    parser.add_argument("--network", choices=sorted(IMAGE_NETWORKS), help="default: resnet20 for cifar10, else lenet5")
    parser.add_argument(
        "--delays", choices=sorted(_TAILS), default="pareto", help="law of the delays (default: %(default)s)"
    )
    add_number("--delay", 20.0, "shortest delay (Pareto) or median (lognormal), in milliseconds", float)
    parser.add_argument("--tail", type=float, help="tail index (Pareto: 1.5) or sigma (lognormal: 1)")
    add_number("--longest", 5.0, "delays are cut to this, in seconds", float)
    add_number("--num-requests", 200, "requests to each of the five schemes")
    add_number("--batch-size", 40, "images in a request")
    add_number("--clients", 2, "requests made concurrently")
    add_number("--num-data", 20, "K, images coded together")
    add_number("--num-workers", 30, "N, worker processes")
    add_number("--num-answers", 25, "answers that the published code waits for")
    add_number("--tolerance", 1.0, "predicted error of an image's logits to reach", float)
    add_number("--seed", 0, "seed of weights, images and delays")
    parser.add_argument(
        "--weights", type=Path, help="safetensors file with the network's weights; written if it does not exist"
    )
    parser.add_argument("--out", type=Path, default=Path("out/serve"), help="folder to write to (default: %(default)s)")
    return parser


def _servers(pool, tuned, delays: Delays, args: argparse.Namespace) -> dict[str, jc.CodedServer]:
    """Makes each scheme's server, by label. All share the pool's workers."""
    num_data, size = args.num_data, (args.num_data, args.num_workers)
    code, stop = tuned.code, jc.stop
    if isinstance(code, jc.ReplicationCode):
        # Replication was chosen: workers compute the same inputs, and a spline fills in those without an answer.
        code = jc.SplineCode.repeated(*size)

    def server(code, policy, **options):
        return jc.CodedServer(code, pool, policy, time_limit=3 * args.longest, **{"predict_error": False, **options})

    uncoded, again_after = jc.UncodedCode(num_data), delays.quantile(_HEDGE_QUANTILE)
    accurate = stop.answers(num_data) & stop.error_below(args.tolerance)
    return {
        "uncoded": server(uncoded, stop.answers(num_data)),
        "replication": server(jc.ReplicationCode(*size), stop.answers(1)),
        "hedged replication": server(uncoded, stop.answers(num_data), again_after=again_after),
        "LeTCC, as published": server(
            jc.SplineCode.chebyshev(*size), stop.answers(args.num_answers), output=jc.outputs.probabilities
        ),
        "ours": server(
            code,
            accurate | stop.deadline(delays.quantile(_DEADLINE_QUANTILE)),
            order=tuned.order,
            output=tuned.output,
            again_after=again_after,
            predict_error=True,
        ),
    }


def _measure(
    label: str, server: jc.CodedServer, images: np.ndarray, batches: list[np.ndarray], clients: int
) -> Outcome:
    """Sends all batches, given by the numbers of their images, several concurrently."""

    def send(batch):
        start_time = time.perf_counter()
        try:
            prediction = server(images[batch])
        except jc.pools.NotEnoughAnswers:
            return time.perf_counter() - start_time, np.full(len(batch), -1), 0
        return time.perf_counter() - start_time, np.argmax(prediction.values, axis=-1), int(prediction.returned.sum())

    first_call_time = time.perf_counter()
    with ThreadPoolExecutor(clients) as executor:
        results = list(tqdm(executor.map(send, batches), total=len(batches), desc=label, unit="request"))
    latency, classes, answers = (np.stack(column) for column in zip(*results, strict=True))
    return Outcome(label, latency, time.perf_counter() - first_call_time, classes, answers)


def _table(outcomes: list[Outcome], reference: np.ndarray, labels: np.ndarray) -> str:
    quantiles = [f"p{100 * probability:g}" for probability in _QUANTILES]
    lines = [
        f"{'':22}" + "".join(f"{name:>8}" for name in (*quantiles, "req/s", "answers")) + "   accuracy   agreement"
    ]
    for outcome in outcomes:
        milliseconds = 1000 * np.quantile(outcome.latency, _QUANTILES)
        rate, answers = len(outcome.latency) / outcome.seconds, outcome.answers.mean()
        cells = "".join(f"{cell:>8.0f}" for cell in milliseconds) + f"{rate:>8.1f}{answers:>8.1f}"
        accuracy, agreement = np.mean(outcome.classes == labels), np.mean(outcome.classes == reference)
        lines.append(f"{outcome.label:22}{cells}      {accuracy:.4f}      {agreement:.4f}")
    return "\n".join(lines)


def _write(outcomes: list[Outcome], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("scheme", "request", "seconds", "answers"))
        for outcome in outcomes:
            for i, (seconds, answers) in enumerate(zip(outcome.latency, outcome.answers, strict=True)):
                writer.writerow((outcome.label, i, f"{seconds:.6f}", answers))


if __name__ == "__main__":
    main()
