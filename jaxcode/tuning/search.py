"""Which code, order and output space answer best for a model, measured on a sample of its inputs, without labels."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray, PyTree
from scipy import optimize
from tqdm import tqdm

from .. import nodes, ordering, outputs
from ..checks import batch_size, check_count
from ..codes import ReplicationCode, SplineCode
from ..codes.replication import assignment
from ..functions import NO_DERIVATIVES, as_pure_function
from ..ordering import Ordering
from ..outputs import OutputSpace
from ..stragglers import AbstractStragglers
from .evaluation import (
    Curve,
    Judge,
    Loss,
    Measurement,
    Model,
    disagreement,
    squared_error,
    standard_error,
)
from .report import Candidate, Tuned

# Of the workers beyond one for each input, the shares that sit between inputs; the others hold second copies.
_SHARES_BETWEEN = (0.0, 0.25, 0.5, 0.75, 1.0)
# Smoothings that are tried, in units of K^-4: at one unit a curve through K data begins to let go of each of them.
_SMOOTHINGS = (0.01, 0.1, 1.0, 10.0)
# How many of the best are tried with smoothing; the best of them also with smoothing of the encoder.
_FINALISTS = 3


def tune(
    f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]],
    x_sample: PyTree[ArrayLike],
    num_data: int,
    num_workers: int,
    stragglers: AbstractStragglers,
    *,
    loss: Loss | None = None,
    layouts: Mapping[str, SplineCode | ReplicationCode] | None = None,
    orders: Mapping[str, Ordering | None] | None = None,
    num_masks: int = 256,
    model_batch: int = 128,
    key: PRNGKeyArray | None = None,
    progress: bool = True,
) -> Tuned:
    """Chooses the code that loses least for a model, its inputs and its stragglers.

    What coding loses depends on the model: a smooth one gains from workers that sit between the inputs, a rough one
    only from second copies of them, whose lost answers the curve fills in. So it is measured. Candidates are node
    layouts, from replication to the paper's, crossed with orders of the batch and with the spaces in which a
    classifier's answers can be decoded. All of them decode under the same straggler sets, and are compared with what
    the model itself answers to the sample; no labels are needed.

    The model runs once on what a worker computes, whatever the number of stragglers, and once for all candidates
    that would have it compute the same. By successive halving, all candidates meet a quarter of the sample, the
    better half of them half of it, the better half of those all of it. The best few are then tried with smoothing of
    the decoder, on a grid and from there by the gradient of the squared error, and the best with smoothing of the
    encoder too; that by gradient where the model has derivatives.

    Replication is a candidate like others. It is chosen unless another one loses less by more than the standard error
    of the difference, and so is no smoothing.

    Args:
        f: The model, as `jaxcode.coded` takes it.
        x_sample: Inputs as they will come, leaves (B, ...), at least two groups of num_data. Batches as large as those
            to come tell most: the longer a batch, the closer its neighbours. A few hundred inputs are enough.
        num_data: K, inputs coded together, at least 2.
        num_workers: N, at least 2.
        stragglers: Who is late, such as `jaxcode.stragglers.Uniform(5)`.
        loss: From results and the model's own answers, leaves (K, ...), to the number to be lowered; traced, under
            vmap. If not given: `disagreement` of the most likely class for a model that returns one array (B, classes)
            with at least two classes, else `squared_error`. An input that the code loses counts as disagreement; any
            other loss is given the sample's mean answer in its place.
        layouts: Candidates by name, codes of K and N; `standard_layouts` if not given.
        orders: Orders of the batch by name, None for its own; `standard_orders` if not given.
        num_masks: Straggler sets to average over.
        model_batch: Inputs that the model runs on at a time, and is differentiated on.
        key: Random key of the straggler sets.
        progress: Whether to show a progress bar on standard error.

    Returns:
        The choice, with `coded(f)` to use it, and `table()` and `plot()` to see what it was chosen from.

    Raises:
        ValueError: If the sample is shorter than two groups, numbers are not whole or too small, stragglers is no
            straggler model, a layout is for other K and N, or there is none.

    Note:
        With layouts={"Chebyshev": SplineCode.chebyshev(K, N)} and orders={"as given": None} this is NeRCC (arXiv
        2402.04377): the two smoothings of the paper's code, tuned to the model.

    References:
        Karnin, Koren and Somekh, ICML 2013, for successive halving. arXiv 2406.00300, section 5, tunes smoothing so.

    >>> from jaxcode import stragglers
    >>> x = jnp.linspace(0.0, 3.0, 32)[:, None]
    >>> tuned = tune(jnp.sin, x, num_data=8, num_workers=12, stragglers=stragglers.Uniform(2), progress=False)
    >>> predict = tuned.coded(jnp.sin)
    >>> float(jnp.max(jnp.abs(predict(x, jnp.arange(12) > 1) - jnp.sin(x)))) < 0.01
    True
    """
    num_data = check_count("num_data", num_data, least=2)
    num_workers = check_count("num_workers", num_workers, least=2)
    check_count("num_masks", num_masks, least=2)
    check_count("model_batch", model_batch)
    size = batch_size("x_sample", x_sample)
    if size < 2 * num_data:
        raise ValueError(f"x_sample has {size} inputs; expected at least two groups of num_data, {2 * num_data}")
    if not isinstance(stragglers, AbstractStragglers):
        raise ValueError(f"stragglers is {stragglers!r}; expected a model such as jaxcode.stragglers.Uniform(5)")
    orders = standard_orders(f, x_sample, model_batch) if orders is None else orders
    layouts = standard_layouts(num_data, num_workers) if layouts is None else layouts
    _check_candidates(layouts, orders, num_data, num_workers)

    num_groups = size // num_data
    x_sample = jax.tree.map(np.asarray, x_sample)
    model = Model(*as_pure_function(f), min(model_batch, size))
    targets = model(x_sample)
    keys = jax.random.split(jax.random.key(0) if key is None else key, num_masks)
    masks = jax.vmap(lambda k: stragglers.sample(k, num_workers))(keys)
    loss = loss or (disagreement if _is_classifier(targets) else squared_error)
    judge = Judge(masks, targets, loss, num_groups)

    trials = []
    for name, order in orders.items():
        x, answers = _in_groups((x_sample, targets), order, num_data)
        curves = {}
        for layout, code in layouts.items():
            alpha, smoothing = _data_nodes(code), _smoothings(code)["encoder_smoothing"]
            curve = curves.setdefault((alpha.tobytes(), smoothing), Curve(model, x, answers, alpha, smoothing))
            trials.append(_Trial(layout, name, code, curve, judge))
    ranked = _halving(trials, _output_spaces(targets), num_groups, progress)
    chosen = ranked[0]
    replication = [trial for trial in trials if isinstance(trial.code, ReplicationCode)]
    if replication:
        safe = min(replication, key=lambda trial: trial.measured.rank)
        if not chosen.measured.surely_better_than(safe.measured):
            chosen = safe
            ranked = sorted(ranked, key=lambda trial: trial is not chosen)
    return Tuned(
        chosen.measured.code,
        orders[chosen.order],
        chosen.measured.output,
        tuple(trial.report() for trial in ranked),
        model.count,
    )


def standard_layouts(num_data: int, num_workers: int) -> dict[str, SplineCode | ReplicationCode]:
    """The layouts that `tune` tries, by name.

    Args:
        num_data: K, at least 2.
        num_workers: N, at least 2; with fewer than K only the last of these kinds.

    Returns:
        Replication; for data nodes that are Chebyshev's and for uniform ones, worker nodes from repeated data nodes in
        steps of a quarter to systematic ones; Chebyshev's for both, and uniform ones for both.
    """
    layouts: dict[str, SplineCode | ReplicationCode] = {}
    beyond = num_workers - num_data
    if beyond >= 0:
        layouts["replication"] = ReplicationCode(num_data, num_workers)
        for kind, alpha in (("Chebyshev", nodes.chebyshev_first(num_data)), ("uniform", nodes.uniform(num_data))):
            for between in sorted({round(share * beyond) for share in _SHARES_BETWEEN}):
                name = {0: "repeated", beyond: "systematic"}.get(between, f"{between} of {beyond} between")
                layouts[f"{kind}, {name}"] = SplineCode(alpha, nodes.mixed(alpha, num_workers, between))
    layouts["Chebyshev"] = SplineCode.chebyshev(num_data, num_workers)
    layouts["uniform"] = SplineCode(nodes.uniform(num_data), nodes.uniform(num_workers))
    return layouts


def standard_orders(
    f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]],
    x_sample: PyTree[ArrayLike],
    model_batch: int = 128,
) -> dict[str, Ordering | None]:
    """The orders that `tune` tries, by name.

    Args:
        f: The model, as `jaxcode.coded` takes it.
        x_sample: Inputs, leaves (B, ...).
        model_batch: Inputs that the model is differentiated on at a time.

    Returns:
        The batch's own; by `ordering.greedy` on the inputs; and, of a model that has derivatives, on its `sensitivity`.
    """
    orders: dict[str, Ordering | None] = {"as given": None, "greedy": ordering.greedy}
    try:
        look = ordering.sensitivity(f, x_sample, model_batch=model_batch)
    except NO_DERIVATIVES:
        return orders
    seen = look(x_sample)
    if jnp.all(jnp.isfinite(seen)) and jnp.any(seen != seen[0]):
        orders["greedy by sensitivity"] = functools.partial(ordering.greedy, key=look)
    return orders


@dataclasses.dataclass
class _Trial:
    """A layout in an order, and the best that it has done so far."""

    layout: str
    order: str
    code: SplineCode | ReplicationCode
    curve: Curve
    judge: Judge
    best: Measurement | None = None

    @property
    def measured(self) -> Measurement:
        if self.best is None:
            raise RuntimeError("nothing has been measured yet")
        return self.best

    def _seen(self, groups):
        """Answers of the code's workers to the first groups, and what the model answers to their inputs."""
        at = self.code.worker_nodes if isinstance(self.code, SplineCode) else assignment(self.code)
        targets = jax.tree.map(lambda leaf: leaf[:groups], self.curve.targets)
        return self.curve.answers(np.asarray(at, np.float64), groups), targets

    def meet(self, outputs, groups):
        """Takes the best of these output spaces."""
        self.best = min(self.judge(self.code, outputs, *self._seen(groups)), key=lambda m: m.rank)

    def smooth_encoder(self):
        """Tries smoothing of the encoder: more and more while that helps, and around the best where the error is least.

        The decoder's is chosen anew for each, and in the end the two together.
        """
        before = self.measured
        for smoothing in _SMOOTHINGS:
            trial = self._measured_with(encoder_smoothing=smoothing * self._unit)
            trial.smooth_decoder()
            # At every step, or one of many would win a small sample by chance.
            if not trial.measured.surely_better_than(self.measured):
                break
            self.curve, self.best = trial.curve, trial.best
        if self.measured is not before:
            self._descend(["encoder_smoothing", "decoder_smoothing"])

    def smooth_decoder(self):
        """Tries smoothing of the decoder: on a grid, and around the best of it where the error is least."""
        tried = [self._measured_with(decoder_smoothing=smoothing * self._unit) for smoothing in _SMOOTHINGS]
        best = min(tried, key=lambda trial: trial.measured.rank)
        if best.measured.surely_better_than(self.measured):
            best._descend(["decoder_smoothing"])
            self.best = best.best

    @property
    def _unit(self):
        return float(self.code.num_data) ** -4

    def _with(self, **smoothings):
        """This trial with other smoothings."""
        smoothings = {name: float(value) for name, value in smoothings.items()}
        code = dataclasses.replace(self.measured.code, **smoothings)
        curve = self.curve
        if "encoder_smoothing" in smoothings:
            curve = curve.smoothed(smoothings["encoder_smoothing"])
        return dataclasses.replace(self, code=code, curve=curve, best=None)

    def _measured_with(self, **smoothings):
        trial = self._with(**smoothings)
        trial.meet([self.measured.output], self.measured.losses.shape[1])
        return trial

    def _descend(self, names):
        """Lowers the squared error by the gradient of those smoothings that are not zero."""
        smoothings = _smoothings(self.measured.code)
        names = [name for name in names if smoothings[name] > 0]
        start = np.log([smoothings[name] for name in names])

        def error(logs):
            """Its logarithm, and the derivatives by the smoothings'."""
            trial = self._with(**dict(zip(names, np.exp(logs), strict=True)))
            code = cast(SplineCode, trial.code)
            square, by_decoder, by_answers = self.judge.slopes(
                code, self.measured.output, *trial._seen(self.measured.losses.shape[1])
            )
            slopes = {"decoder_smoothing": by_decoder}
            if "encoder_smoothing" in names:
                slopes["encoder_smoothing"] = trial.curve.slope(np.asarray(code.worker_nodes), by_answers)
            return np.log(square), np.nan_to_num([slopes[name] / square for name in names])

        try:
            found = optimize.minimize(
                error,
                start,
                jac=True,
                method="L-BFGS-B",
                bounds=[(log - np.log(10), log + np.log(10)) for log in start],
                options={"maxiter": 12, "ftol": 1e-5},
            )
        except NO_DERIVATIVES:
            return
        trial = self._measured_with(**dict(zip(names, np.exp(found.x), strict=True)))
        if trial.measured.rank < self.measured.rank:
            self.curve, self.best = trial.curve, trial.best

    def report(self):
        m = self.measured
        half_width = 1.96 * standard_error(m.losses)
        loss = float(m.losses.mean())
        return Candidate(self.layout, self.order, m.code, m.output, loss, half_width, m.rmse, m.losses.shape[1])


def _halving(trials, spaces, num_groups, progress):
    """The trials from best to worst; those that stayed longer first."""
    counts = sorted({max(2, -(-num_groups // parts)) for parts in (4, 2, 1)})
    dropped, kept = [], trials
    with tqdm(desc="tuning", unit="candidate", total=0, disable=not progress) as bar:
        for groups in counts:
            bar.total += len(kept)
            for trial in kept:
                trial.meet(spaces if groups == counts[0] else [trial.measured.output], groups)
                bar.update()
            kept = sorted(kept, key=lambda trial: trial.measured.rank)
            if groups < num_groups:
                keep = max(_FINALISTS, -(-len(kept) // 2))
                # What everything is compared with is measured to the end; it costs nothing.
                stay = [t for i, t in enumerate(kept) if i < keep or isinstance(t.code, ReplicationCode)]
                dropped = [t for t in kept if t not in stay] + dropped
                kept = stay
        finalists = [t for t in kept if isinstance(t.code, SplineCode)][:_FINALISTS]
        bar.total += len(finalists)
        for trial in finalists:
            trial.smooth_decoder()
            bar.update()
        if finalists:
            min(finalists, key=lambda trial: trial.measured.rank).smooth_encoder()
    return sorted(kept, key=lambda trial: trial.measured.rank) + dropped


def _in_groups(tree, order, num_data):
    """Inputs and answers in groups, leaves (groups, K, ...); the groups in random order, so that some stand for all."""
    x, _ = tree
    size = batch_size("x_sample", x)
    path = np.arange(size) if order is None else np.asarray(order(x, num_data))
    groups = path[: size // num_data * num_data].reshape(-1, num_data)
    groups = np.random.default_rng(0).permutation(groups)
    return jax.tree.map(lambda leaf: leaf[groups], tree)


def _data_nodes(code):
    # Replication has none; any will do, as every worker sits at one of them.
    nodes = code.data_nodes if isinstance(code, SplineCode) else np.arange(code.num_data)
    return np.asarray(nodes, np.float64)


def _smoothings(code):
    # Replication has none.
    names = ("encoder_smoothing", "decoder_smoothing")
    return {name: float(np.asarray(getattr(code, name, 0.0))) for name in names}


def _is_classifier(targets):
    return isinstance(targets, np.ndarray) and targets.ndim == 2 and targets.shape[1] >= 2


def _output_spaces(targets) -> list[OutputSpace]:
    if not _is_classifier(targets):
        return [outputs.as_returned]
    values = np.asarray(targets, np.float64)
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-2):
        return [outputs.as_returned, outputs.logits]
    return [outputs.as_returned, outputs.probabilities]


def _check_candidates(layouts, orders, num_data, num_workers):
    if not layouts or not orders:
        raise ValueError(f"layouts has {len(layouts)} and orders {len(orders)} entries; expected at least one of each")
    for name, code in layouts.items():
        if not isinstance(code, SplineCode | ReplicationCode):
            raise ValueError(
                f"layouts[{name!r}] is a {type(code).__name__}; expected a SplineCode or a ReplicationCode"
            )
        if (code.num_data, code.num_workers) != (num_data, num_workers):
            raise ValueError(
                f"layouts[{name!r}] is a code of {code.num_data} inputs for {code.num_workers} workers; expected "
                f"{num_data} and {num_workers}"
            )
