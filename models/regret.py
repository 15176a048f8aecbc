"""Compares what tuning chooses with cheap remedies for lost answers, on several models: `python -m models.regret`."""

import argparse
import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from tqdm import tqdm

import jaxcode as jc
from jaxcode.functions import Model, as_pure_function

from .compare import Setting, read_setting
from .regressions import CASES, Case

_SETTINGS = ((12, 8, 2),)
_BATCH_SIZE = 400
# What is off by less, in units of the outputs' standard deviation, is exact but for rounding.
_EXACT = 1e-4
# Of these the engineer's kernel ridge regression has the best.
_LENGTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_RIDGES = (1e-9, 1e-6, 1e-4, 1e-2, 1e-1)
_SETS_TO_TUNE = 4
_WITHOUT_SURROGATE = ("mean", "nearest", "kernel ridge", "LeTCC")
_FOOTNOTE = """\
Errors: root mean square, in units of the outputs' standard deviation; of "classes", the share of answers of another
class. Regret: of what `jaxcode.tune` chose, over the best baseline's error, less one, with its 95 % interval by
bootstrap over requests, or batches of {batch} inputs; the same inputs and straggler sets for all. Exact: errors up to
{exact:g}. Baselines have the same workers: replication whose lost inputs get the mean answer, that of the nearest
answered input, kernel ridge regression on the answers that came (its length and ridge are the best on the sample that
is tuned on), or a surrogate's guess; the same with copies by the surrogate's risk; and LeTCC as published. Without a
surrogate: neither `tune` nor the baselines have one. {learn} inputs to distil the surrogate from, {tune} others to tune
on, further ones to measure on."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Holds a model whose answers have a standard deviation of 1, and its inputs.

    Attributes:
        f: The model.
        prior: A surrogate that is distilled from other inputs.
        tune: Inputs to tune on, (B, features).
        measure: Inputs to measure on.
    """

    f: Model
    prior: jc.Surrogate
    tune: Float[np.ndarray, "tune features"]
    measure: Float[np.ndarray, "measure features"]


@dataclasses.dataclass(frozen=True)
class Requests:
    """Holds requests, or batches of several, and their straggler sets.

    Attributes:
        x: Inputs.
        targets: The model's answers, in float64.
        masks: Which workers return.
    """

    x: Float[np.ndarray, "requests batch features"]
    targets: Float[np.ndarray, "requests batch outputs"]
    masks: Bool[np.ndarray, "requests sets workers"]


@dataclasses.dataclass(frozen=True)
class Row:
    """Holds the mean losses of requests in one setting.

    Attributes:
        name: Of the case, with "classes" behind it where shares of other classes are counted.
        setting: N, K, S.
        batch_size: B.
        loss: "squared_error" or "disagreement".
        baselines: Losses by name, (requests,).
        tuned: Losses with a surrogate and without one.
        choices: What was chosen.
    """

    name: str
    setting: Setting
    batch_size: int
    loss: str
    baselines: dict[str, Float[np.ndarray, "requests"]]
    tuned: dict[bool, Float[np.ndarray, "requests"]]
    choices: dict[bool, str]

    def error(self, losses: Float[np.ndarray, "requests"]) -> float:
        """Computes the error of a scheme from its losses."""
        return float(self._error(losses.mean()))

    def best(self, has_surrogate: bool) -> str:
        """Returns the name of the best baseline, among all or among those without a surrogate."""
        names = [name for name in self.baselines if has_surrogate or name in _WITHOUT_SURROGATE]
        return min(names, key=lambda name: self.baselines[name].mean())

    def regret(self, has_surrogate: bool) -> tuple[float, float, float]:
        """Computes the regret and its interval, in percent; NaN where both errors are zero."""
        tuned, best = self.tuned[has_surrogate], self.baselines[self.best(has_surrogate)]
        resampled = np.random.default_rng(0).integers(len(tuned), size=(2000, len(tuned)))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self._error(tuned.mean() / best.mean())
            low, high = np.nanquantile(
                self._error(tuned[resampled].mean(axis=1) / best[resampled].mean(axis=1)), (0.025, 0.975)
            )
        return 100 * float(ratio) - 100, 100 * float(low) - 100, 100 * float(high) - 100

    def format(self, has_surrogate: bool) -> str:
        """Formats errors and regret."""
        name, error = self.best(has_surrogate), self.error(self.tuned[has_surrogate])
        if error <= _EXACT:
            return f"{name:>25} {self.error(self.baselines[name]):7.4f} {'exact':>7}"
        regret, low, high = self.regret(has_surrogate)
        errors = f"{self.error(self.baselines[name]):7.4f} {error:7.4f}"
        return f"{name:>25} {errors} {regret:+6.1f} % ({low:+.1f}, {high:+.1f})"

    def _error(self, losses):
        return np.sqrt(losses) if self.loss == "squared_error" else losses


def draw_sample(case: Case, *, num_learn: int, num_tune: int, num_measure: int, cost: float, seed: int) -> Sample:
    """Draws inputs of a case, disjoint for each purpose, and distils its surrogate."""
    rng = np.random.default_rng((seed, 0))
    learn, tune, measure = (case.draw(rng, count) for count in (num_learn, num_tune, num_measure))
    fn, params = as_pure_function(case.f)
    scale = np.sqrt(np.var(np.asarray(jax.jit(fn)(params, learn)), axis=0).mean())

    def f(x):
        return fn(params, x) / scale

    return Sample(f, jc.surrogate(f, learn, cost=cost, seed=seed, progress=False), tune, measure)


def draw_requests(sample: Sample, setting: Setting, batch_size: int, num_requests: int, num_sets: int, seed: int):
    """Makes requests of the inputs to measure on, and draws straggler sets of each."""
    return _make_requests(sample, sample.measure[: num_requests * batch_size], setting, batch_size, num_sets, seed)


def measure_baselines(sample: Sample, requests: Requests, setting: Setting, loss: str, seed: int):
    """Measures all baselines: by name, the mean loss of each request."""
    num_workers, num_data, num_late = setting
    code = jc.ReplicationCode(num_data, num_workers)
    batch_size = requests.x.shape[1]
    to_tune = _make_requests(sample, sample.tune, setting, batch_size, _SETS_TO_TUNE, seed + 1)
    mean = to_tune.targets.mean(axis=(0, 1))
    choice = choose_ridge(code, to_tune, loss)
    is_lost = _find_lost(code, requests)

    def fill(guess):
        """Measures replication whose lost inputs have the guesses, leaves (sets, B, outputs)."""
        return np.array(
            [
                np.mean(_LOSSES[loss](guess(x, targets, lost), targets) * lost)
                for x, targets, lost in zip(requests.x, requests.targets, is_lost, strict=True)
            ]
        )

    placed = jc.coded(sample.f, code, prior=sample.prior, stragglers=jc.stragglers.Uniform(num_late), loss=loss)
    published = jc.coded(sample.f, jc.SplineCode.chebyshev(num_data, num_workers, decoder_smoothing=1e-8))
    return {
        "mean": fill(lambda x, targets, lost: np.broadcast_to(mean, targets.shape)),
        "nearest": fill(guess_from_nearest),
        "kernel ridge": fill(lambda x, targets, lost: guess_by_ridge(x, targets, lost, *choice)),
        "LeTCC": measure(published, requests, loss),
        "surrogate": fill(lambda x, targets, lost: sample.prior(x)),
        "surrogate, copies": measure(placed, requests, loss),
    }


def measure(predict: Callable[..., Array], requests: Requests, loss: str) -> Float[np.ndarray, "requests"]:
    """Measures a coded model: the mean loss of each request over its straggler sets."""
    decode = jax.jit(lambda x, masks: jax.lax.map(lambda returned: predict(x, returned), masks, batch_size=4))
    return np.array(
        [
            np.mean(_LOSSES[loss](decode(x, masks), targets))
            for x, masks, targets in zip(requests.x, requests.masks, requests.targets, strict=True)
        ]
    )


def guess_from_nearest(
    x: Float[np.ndarray, "batch features"],
    targets: Float[np.ndarray, "batch outputs"],
    is_lost: Bool[np.ndarray, "sets batch"],
) -> Float[np.ndarray, "sets batch outputs"]:
    """Guesses the answers to lost inputs to be those of the nearest input that is not lost."""
    return targets[np.argmin(np.where(is_lost[:, None], np.inf, _squared_distances(x)), axis=2)]


def guess_by_ridge(
    x: Float[np.ndarray, "batch features"],
    targets: Float[np.ndarray, "batch outputs"],
    is_lost: Bool[np.ndarray, "sets batch"],
    length: float,
    ridge: float,
) -> Float[np.ndarray, "sets batch outputs"]:
    """Guesses answers by kernel ridge regression on the inputs that are not lost, in float64.

    Args:
        x: The inputs.
        targets: The model's answers; those of lost inputs are not read.
        is_lost: Which these are.
        length: Of the Gaussian kernel, in units of the median distance of inputs.
        ridge: Added to the kernel's diagonal.
    """
    squares = _squared_distances(x)
    kernel = np.exp(-squares / (2 * length**2 * np.median(squares)))
    answered = np.where(is_lost, 0.0, 1.0)[:, :, None]
    known = targets * answered
    mean = known.sum(axis=1, keepdims=True) / answered.sum(axis=1, keepdims=True)
    # Rows and columns of lost inputs are those of the identity, so that their coefficients are zero.
    diagonal = np.where(is_lost, 1.0, ridge)[:, :, None] * np.eye(len(x))
    matrix = kernel * answered * np.swapaxes(answered, 1, 2) + diagonal
    return mean + kernel @ np.linalg.solve(matrix, (known - mean) * answered)


def choose_ridge(code: jc.ReplicationCode, requests: Requests, loss: str) -> tuple[float, float]:
    """Chooses the length and the ridge of kernel ridge regression that lose least."""
    is_lost = _find_lost(code, requests)

    def lose(choice):
        return np.mean(
            [
                np.mean(_LOSSES[loss](guess_by_ridge(x, targets, lost, *choice), targets) * lost)
                for x, targets, lost in zip(requests.x, requests.targets, is_lost, strict=True)
            ]
        )

    return min(((length, ridge) for length in _LENGTHS for ridge in _RIDGES), key=lose)


def main(argv: Sequence[str] | None = None) -> None:
    """Tunes for every model, measures what was chosen and the baselines, and prints the regrets.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid.
    """
    parser = _make_parser()
    args = parser.parse_args(argv)
    if min(args.requests, args.batches, args.sets) < 2:
        parser.error("--requests, --batches and --sets must be at least 2")
    settings = args.setting or list(_SETTINGS)
    largest = max(num_data for _, num_data, _ in settings)
    if args.tune < max(args.batch, 2 * largest):
        parser.error(f"--tune must be at least a batch and two requests, {max(args.batch, 2 * largest)}")
    cases = {name: CASES[name](args.seed) for name in args.case or CASES}
    heads = (f"{kind}: best of others{'tuned':>8}{'regret':>22}" for kind in ("with a surrogate", "without"))
    print(f"{'':29} {'N,K,S':>8} {'B':>4} " + " ".join(f"{head:>62}" for head in heads))
    rows = []
    total = sum(len(case.losses) for case in cases.values()) * len(settings) * 2
    with tqdm(desc="tuning", unit="row", total=total) as bar:
        for name, case in cases.items():
            sample = draw_sample(
                case,
                num_learn=args.learn,
                num_tune=args.tune,
                num_measure=max(args.requests * largest, args.batches * args.batch),
                cost=args.cost,
                seed=args.seed,
            )
            for loss in case.losses:
                for setting in settings:
                    for count, batch_size in ((args.requests, setting[1]), (args.batches, args.batch)):
                        row = _measure_row(name, sample, setting, batch_size, loss, count, args.sets, args.seed)
                        rows.append(row)
                        cells = " ".join(f"{row.format(has_surrogate):62}" for has_surrogate in (True, False))
                        bar.write(f"{row.name:29} {','.join(map(str, setting)):>8} {row.batch_size:4} {cells}")
                        bar.update()
    args.out.mkdir(parents=True, exist_ok=True)
    _write_csv(rows, args.out / "figures.csv")
    print(f"\n{_FOOTNOTE.format(batch=args.batch, exact=_EXACT, learn=args.learn, tune=args.tune)}")
    print(f"In {args.out}/: figures.csv, with the errors of all baselines")


def _measure_row(name, sample, setting, batch_size, loss, num_requests, num_sets, seed) -> Row:
    """Tunes in one setting, with a surrogate and without, and measures what was chosen and the baselines."""
    num_workers, num_data, num_late = setting
    batch_size = batch_size // num_data * num_data
    requests = draw_requests(sample, setting, batch_size, num_requests, num_sets, seed)
    losses, choices = {}, {}
    for has_surrogate in (True, False):
        tuned = jc.tune(
            sample.f,
            sample.tune,
            num_data,
            num_workers,
            jc.stragglers.Uniform(num_late),
            prior=sample.prior if has_surrogate else None,
            batch_size=batch_size,
            loss=loss,
            progress=False,
        )
        losses[has_surrogate] = measure(tuned.coded(sample.f), requests, loss)
        chosen = tuned.candidates[0]
        choices[has_surrogate] = "; ".join(filter(None, (chosen.layout, chosen.order, chosen.prior)))
    baselines = measure_baselines(sample, requests, setting, loss, seed)
    name = name if loss == "squared_error" else f"{name}, classes"
    return Row(name, setting, batch_size, loss, baselines, losses, choices)


def _make_requests(sample, x, setting, batch_size, num_sets, seed):
    num_workers, _, num_late = setting
    num_requests = len(x) // batch_size
    x = x[: num_requests * batch_size]
    targets = np.asarray(sample.f(x), np.float64).reshape(num_requests, batch_size, -1)
    keys = jax.random.split(jax.random.key(seed), num_requests * num_sets)
    masks = jax.vmap(lambda key: jc.stragglers.Uniform(num_late).sample(key, num_workers=num_workers))(keys)
    masks = np.asarray(masks).reshape(num_requests, num_sets, num_workers)
    return Requests(x.reshape(num_requests, batch_size, -1), targets, masks)


def _find_lost(code, requests):
    """Finds the inputs that replication loses, (requests, sets, B)."""
    recovered = jax.vmap(jax.vmap(code.recovered))(jnp.asarray(requests.masks))
    return ~np.tile(np.asarray(recovered), requests.x.shape[1] // code.num_data)


def _squared_distances(x):
    x = np.asarray(x, np.float64)
    x = x - x.mean(axis=0)
    norms = np.sum(x**2, axis=1)
    return np.maximum(norms[:, None] + norms - 2 * x @ x.T, 0)


def _squared_error(results, targets):
    return np.mean(np.square(np.asarray(results, np.float64) - targets), axis=-1)


def _disagreement(results, targets):
    return np.where(np.argmax(results, axis=-1) != np.argmax(targets, axis=-1), 1.0, 0.0)


_LOSSES = {"squared_error": _squared_error, "disagreement": _disagreement}


def _write_csv(rows, path):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "N", "K", "S", "B", "scheme", "error", "regret %", "low", "high", "chosen"))
        for row in rows:
            head = (row.name, *row.setting, row.batch_size)
            for name, losses in row.baselines.items():
                writer.writerow((*head, name, row.error(losses), "", "", "", ""))
            for has_surrogate, losses in row.tuned.items():
                name = "tuned" if has_surrogate else "tuned without a surrogate"
                regret = row.regret(has_surrogate)
                writer.writerow((*head, name, row.error(losses), *regret, row.choices[has_surrogate]))


def _make_parser():
    parser = argparse.ArgumentParser(prog="python -m models.regret", description=__doc__)
    add = parser.add_argument
    add("--case", action="append", choices=list(CASES), help="a model; may be repeated (default: all)")
    add("--setting", type=read_setting, action="append", metavar="N,K,S", help="default: 12,8,2; may be repeated")
    add("--batch", type=int, default=_BATCH_SIZE, help="inputs that come together (default: %(default)s)")
    add("--learn", type=int, default=1000, help="inputs to distil surrogates from (default: %(default)s)")
    add("--tune", type=int, default=800, help="inputs to tune on (default: %(default)s)")
    add("--requests", type=int, default=40, help="requests to measure on (default: %(default)s)")
    add("--batches", type=int, default=6, help="batches to measure on (default: %(default)s)")
    add("--sets", type=int, default=8, help="straggler sets of each (default: %(default)s)")
    add("--cost", type=float, default=0.1, help="of a surrogate, over the model's (default: %(default)s)")
    add("--seed", type=int, default=0, help="of models, inputs and straggler sets (default: %(default)s)")
    add("--out", type=Path, default=Path("out/regret"), help="folder to write to (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
