"""Measures how soon faulty workers are found, one request of K images at a time: `python -m models.defences`."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

import jaxcode as jc

from . import datasets
from .compare import Setting, read_setting
from .networks import DEFAULT_NETWORKS, load_stored
from .training import compute_logits

_SETTINGS = ((60, 20, 10), (30, 20, 5))
# One worker in twenty is faulty, of 30 two.
_SHARE_FAULTY = 0.05
_SURROGATE_IMAGES = 3000
_CALIBRATION_REQUESTS = 50
_FOOTNOTE = """\
Found: the share of faulty workers that are flagged within {requests} requests of K images each, and the median
number of requests that it took; all found: the share of runs in which all of them are. Correct flagged: workers, in all
{runs} runs together. Classes lost: the share of images of another class than without late and faulty workers, over all
requests, without the defence and with it. Requests are drawn from {pool} of test images, faulty and late workers at
random in every run. A copy is the answer of the worker N/2 away, to whatever it computes. Noise has a tenth of the
variance of the logits."""

Attack = Callable[[PRNGKeyArray, Float[Array, "workers classes"]], Float[Array, "workers classes"]]


@dataclasses.dataclass(frozen=True)
class Requests:
    """Holds requests and what correct workers answer.

    Attributes:
        plans: Of all requests, leaves (requests, ...).
        answers: (requests, N, classes).
        targets: The network's answers to the inputs, (requests, K, classes).
    """

    plans: jc.codes.Plan
    answers: Float[np.ndarray, "requests workers classes"]
    targets: Float[np.ndarray, "requests data classes"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Holds what a defence did in some runs.

    Attributes:
        flagged: Whom it flagged, (runs, requests, N).
        faulty: Who was faulty, (runs, N).
        lost: Share of results of another class than the network's, (runs, requests), and the same without the defence.
        undefended: The latter.
    """

    flagged: Bool[np.ndarray, "runs requests workers"]
    faulty: Bool[np.ndarray, "runs workers"]
    lost: Float[np.ndarray, "runs requests"]
    undefended: Float[np.ndarray, "runs requests"]

    @property
    def first(self) -> Float[np.ndarray, "runs workers"]:
        """The number of the request, from 1, by which each worker is flagged first; infinite if never."""
        return np.where(self.flagged.any(axis=1), 1.0 + np.argmax(self.flagged, axis=1), np.inf)

    def format(self) -> str:
        """Formats one row of the table."""
        first = self.first[self.faulty]
        correct = int(np.isfinite(self.first[~self.faulty]).sum())
        if not self.faulty.any():
            return f"{'':>8}{'':>12}{'':>11}{correct:>10}{self.undefended.mean():>18.4f}{self.lost.mean():>10.4f}"
        all_found = np.mean((np.isfinite(self.first) | ~self.faulty).all(axis=1))
        return (
            f"{np.isfinite(first).mean():>8.3f}{np.median(first):>12.0f}{all_found:>11.2f}{correct:>10}"
            f"{self.undefended.mean():>18.4f}{self.lost.mean():>10.4f}"
        )


def flip_signs(key: PRNGKeyArray, answers: Float[Array, "workers classes"]) -> Float[Array, "workers classes"]:
    """Returns answers of the wrong sign."""
    return -answers


def copy(key: PRNGKeyArray, answers: Float[Array, "workers classes"]) -> Float[Array, "workers classes"]:
    """Returns for each worker the answer of the one N / 2 away."""
    return jnp.roll(answers, len(answers) // 2, axis=0)


def add_noise(key: PRNGKeyArray, answers: Float[Array, "workers classes"]) -> Float[Array, "workers classes"]:
    """Returns answers with normal noise of a tenth of their variance."""
    return answers + np.sqrt(0.1) * jnp.std(answers) * jax.random.normal(key, answers.shape)


ATTACKS: dict[str, Attack] = {"nobody": lambda key, answers: answers, "sign flips": flip_signs, "copies": copy}
ATTACKS["noise"] = add_noise


def run(
    code: jc.AbstractCode,
    test: jc.robust.SequentialTest,
    requests: Requests,
    attack: Attack,
    *,
    num_faulty: int,
    num_late: int,
    num_runs: int,
    num_requests: int,
    seed: int,
) -> Outcome:
    """Runs requests one after the other, with the same faulty workers in all requests of a run.

    Args:
        code: The code.
        test: The defence.
        requests: From which requests are drawn.
        attack: What faulty workers answer.
        num_faulty: How many there are in each run.
        num_late: How many workers do not answer a request, at random.
        num_runs: Runs.
        num_requests: Requests of a run.
        seed: Of everything that is drawn.
    """
    num_workers = code.num_workers
    plans, answers, targets = jax.device_put((requests.plans, requests.answers, requests.targets))

    def step(faulty, evidence, key):
        keys = jax.random.split(key, 3)
        index = jax.random.randint(keys[0], (), 0, len(answers))
        plan = jax.tree.map(lambda leaf: leaf[index], plans)
        sent = jnp.where(faulty[:, None], attack(keys[1], answers[index]), answers[index])
        returned = jc.stragglers.Uniform(num_late).sample(keys[2], num_workers)
        group = jax.tree.map(lambda leaf: leaf[None], plan)
        detection = test(code, sent[:, None], returned, plans=group, evidence=evidence)

        def lose(trusted):
            return 1 - jc.metrics.agreement(code.decode(sent, trusted, plan), targets[index])

        return detection.evidence, (detection.flagged, lose(detection.trusted), lose(returned))

    def run_once(key):
        chosen, drawn = jax.random.split(key)
        faulty = jax.random.permutation(chosen, num_workers) < num_faulty
        _, rows = jax.lax.scan(
            functools.partial(step, faulty), jnp.zeros(num_workers), jax.random.split(drawn, num_requests)
        )
        return rows, faulty

    (flagged, lost, undefended), faulty = jax.jit(lambda keys: jax.lax.map(run_once, keys))(
        jax.random.split(jax.random.key(seed), num_runs)
    )
    return Outcome(*map(np.asarray, (flagged, faulty, lost, undefended)))


def prepare(
    code: jc.AbstractCode,
    prior: jc.Surrogate,
    stragglers: jc.stragglers.AbstractStragglers | None,
    images: Float[np.ndarray, "requests data height width channels"],
    apply: Callable[[np.ndarray], np.ndarray],
) -> Requests:
    """Plans and encodes requests, and computes what correct workers answer."""

    def plan(group):
        plan = jc.allocation.plan(code, group, prior=prior, stragglers=stragglers)
        return plan, code.encode(group, plan)

    plans, coded = jax.jit(lambda images: jax.lax.map(plan, images))(images)
    answers, targets = (
        apply(np.asarray(batch).reshape(-1, *images.shape[2:])).reshape(*batch.shape[:2], -1)
        for batch in (coded, images)
    )
    return Requests(plans, answers, targets)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs attacks against a trained network's workers and prints who was found.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid.
    """
    parser = _make_parser()
    args = parser.parse_args(argv)
    try:
        data = datasets.load(args.dataset, args.data_dir)
        prior = None if args.prior is None else jc.load_surrogate(args.prior)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    settings: list[Setting] = args.setting or list(_SETTINGS)
    largest = max(num_data for _, num_data, _ in settings)
    if len(data.x_test) < (_CALIBRATION_REQUESTS + 2) * largest:
        parser.error(f"--setting has K = {largest}, too large for {len(data.x_test)} test images")
    name = args.network or DEFAULT_NETWORKS[args.dataset]
    model = load_stored(name, data, args.dataset, args.out)
    if prior is None:
        prior = jc.surrogate(model, data.x_train[:_SURROGATE_IMAGES], cost=0.13, seed=args.seed)
    print(f"{name} on {args.dataset}; the surrogate takes {prior.cost:.1%} of its operations.\n")

    def apply(images):
        return np.asarray(compute_logits(model, images))

    header = f"{'':28}{'found':>8}{'requests':>12}{'all found':>11}{'correct':>10}{'classes lost':>18}{'':>10}\n"
    header += f"{'':28}{'':>8}{'(median)':>12}{'(runs)':>11}{'flagged':>10}{'undefended':>18}{'defended':>10}"
    rng = np.random.default_rng(args.seed)
    for setting in settings:
        num_workers, num_data, num_late = setting
        num_faulty = max(2, round(_SHARE_FAULTY * num_workers))
        first, rest = np.split(rng.permutation(len(data.x_test)), [_CALIBRATION_REQUESTS * num_data])
        images = data.x_test[rest[: len(rest) // num_data * num_data]].reshape(-1, num_data, *data.x_test.shape[1:])
        images = images[: args.pool]
        for title, code, stragglers in _codes(setting):
            test = jc.robust.SequentialTest()
            if stragglers is None:
                test = jc.robust.calibrate(model, code, data.x_test[first], prior)
            print(f"(N, K, S) = {setting}, {num_faulty} faulty: {title}\n{header}")
            requests = prepare(code, prior, stragglers, images, apply)
            for attack_name, attack in ATTACKS.items():
                outcome = run(
                    code,
                    test,
                    requests,
                    attack,
                    num_faulty=0 if attack_name == "nobody" else num_faulty,
                    num_late=num_late,
                    num_runs=args.runs,
                    num_requests=args.requests,
                    seed=args.seed,
                )
                print(f"{attack_name:<28}{outcome.format()}", flush=True)
            print()
    print(_FOOTNOTE.format(requests=args.requests, runs=args.runs, pool=args.pool))


def _codes(setting: Setting):
    """Returns titles, codes, and the stragglers by which copies are placed; None for codes that mix inputs."""
    num_workers, num_data, num_late = setting
    copies = jc.ReplicationCode(num_data, num_workers)
    spline = jc.SplineCode.systematic(num_data, num_workers)
    return (
        ("copies placed by the surrogate's risks", copies, jc.stragglers.Uniform(num_late)),
        ("systematic spline code with the surrogate as prior", spline, None),
    )


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.defences", description=__doc__)
    add = parser.add_argument
    add("--dataset", choices=datasets.NAMES, default="digits", help="images (default: %(default)s)")
    add("--network", help="network; that of the stored weights if not given")
    add("--prior", type=Path, help="file of a surrogate that `save` wrote; distilled if not given")
    add("--setting", type=read_setting, action="append", metavar="N,K,S", help="workers, inputs, late; may be repeated")
    add("--runs", type=int, default=100, help="runs of each attack (default: %(default)s)")
    add("--requests", type=int, default=50, help="requests of a run (default: %(default)s)")
    add("--pool", type=int, default=200, help="different requests (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--data-dir", help="folder of the data sets; JAXCODE_DATA if not given")
    add("--out", type=Path, default=Path("out/defences"), help="folder of trained weights (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
