"""Chooses the code, order and output space for a model by measurement on a sample of its inputs, without labels."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray, PyTree

from .. import nodes, ordering, outputs
from .._batched_model import BatchedModel
from ..checks import batch_size, check_count
from ..codes import AbstractCode, ReplicationCode, SplineCode
from ..functions import NO_DERIVATIVES, as_pure_function
from ..ordering import Ordering
from ..outputs import OutputSpace
from ..pipeline import group
from ..stragglers import AbstractStragglers
from .answers import AnswerCache
from .evaluation import Evaluator, standard_error
from .losses import Loss, disagreement, squared_error
from .report import Candidate, Tuned
from .trials import Option, Trial, select

__all__ = ["standard_layouts", "standard_orders", "tune"]

# The shares of the N - K surplus workers whose nodes lie between data nodes; the others' repeat data nodes. Smooth
# models gain from the former, rough ones from the latter; each further share is one more candidate in every order.
_SHARES_BETWEEN = (0.0, 0.25, 0.5, 0.75, 1.0)


def tune(
    f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]],
    x_sample: PyTree[ArrayLike],
    num_data: int,
    num_workers: int,
    stragglers: AbstractStragglers,
    *,
    loss: Loss | None = None,
    layouts: Mapping[str, AbstractCode] | None = None,
    orders: Mapping[str, Ordering | None] | None = None,
    num_masks: int = 256,
    model_batch: int = 128,
    key: PRNGKeyArray | None = None,
    progress: bool = True,
) -> Tuned:
    """Chooses the code that loses least for a model, its inputs and its stragglers.

    What coding loses depends on the model: a smooth one gains from workers that sit between the inputs, a rough one
    only from second copies of them, from which the curve fills in lost answers. So it is measured. Candidates are node
    layouts, from replication to the paper's, crossed with orders of the batch and with the spaces in which a
    classifier's answers can be decoded. All of them decode under the same straggler sets, and are compared with what
    the model itself answers to the sample; no labels are needed.

    The model runs once on each coded input, whatever the number of straggler sets, and once for all candidates that
    have the same coded inputs. By successive halving, all candidates are measured on a quarter of the sample, the
    better half of them on half of it, the better half of those on all of it. The best few are then tried with smoothing
    of the decoder, on a grid and from there by the gradient of the squared error, and the best with smoothing of the
    encoder too; that by the gradient where the model has derivatives.

    Replication, and any other code whose workers compute the inputs themselves and mix nothing, is measured to the end.
    It is chosen unless another candidate loses less by more than the standard error of the difference. Smoothing has to
    improve in the same way.

    Args:
        f: The model, as `jaxcode.coded` takes it.
        x_sample: Inputs as they will come, leaves (B, ...), at least two groups of num_data. A sample as large as the
            batches to come is best: the larger a batch, the closer its neighbours when it is ordered. A few hundred
            inputs are enough.
        num_data: K, inputs coded together, at least 2.
        num_workers: N, at least 2.
        stragglers: Which workers are late, such as `jaxcode.stragglers.Uniform(5)`.
        loss: From results and the model's own answers, leaves (K, ...), to the number to be lowered; traced, under
            vmap. If not given: `disagreement` of the most likely class for a model that returns one array (B, classes)
            with at least two classes, else `squared_error`. An input that the code loses counts as disagreement; any
            other loss is given the sample's mean answer in its place.
        layouts: Candidates by name, codes of K and N; `standard_layouts` if not given. Smoothing is tuned for those
            whose interpolants have it.
        orders: Orders of the batch by name, None for its own; `standard_orders` if not given.
        num_masks: Straggler sets to average over, at least 2.
        model_batch: Inputs that the model runs on at a time, and is differentiated on.
        key: Random key of the straggler sets.
        progress: Whether to show a progress bar on standard error.

    Returns:
        The choice, with `coded(f)` to use it, and `table()` and `plot()` to see what it was chosen from.

    Raises:
        ValueError: If the sample is shorter than two groups, numbers are not whole or too small, stragglers is no
            straggler model, there is no layout or no order, a layout is no code of K and N, an order returns no
            permutation, f is no model, its results do not have the batch as leading axis, or inputs or answers are no
            real numbers where a layout mixes them.

    Note:
        With layouts={"Chebyshev": SplineCode.chebyshev(K, N)} and orders={"as given": None} this is NeRCC (arXiv
        2402.04377): the two smoothings of the paper's code, tuned to the model.

    References:
        Karnin, Koren and Somekh, ICML 2013, for successive halving; arXiv 2406.00300, section 5, for smoothing.

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
    mixes = any(code.encoder_linop().mixes for code in layouts.values())
    model = BatchedModel(*as_pure_function(f), min(model_batch, size), allow_integers=not mixes)
    targets = model(x_sample)
    keys = jax.random.split(jax.random.key(0) if key is None else key, num_masks)
    masks = jax.vmap(lambda key: stragglers.sample(key, num_workers))(keys)
    loss = loss or (disagreement if _is_classifier(targets) else squared_error)
    evaluator = Evaluator(masks, targets, loss, num_groups)

    options = []
    for name, order in orders.items():
        cache = AnswerCache(model, *_group_sample(x_sample, targets, order, num_data))
        options += [Option(layout, name, code, cache) for layout, code in layouts.items()]
    ranked = select(evaluator, options, _output_spaces(targets), num_groups, progress)
    chosen = _prefer_copies(ranked)
    ranked.sort(key=lambda trial: trial is not chosen)
    return Tuned(
        chosen.measurement.code,
        orders[chosen.option.order],
        chosen.measurement.output,
        tuple(_candidate(trial) for trial in ranked),
        model.count,
    )


def standard_layouts(num_data: int, num_workers: int) -> dict[str, AbstractCode]:
    """Makes the layouts that `tune` tries, by name.

    Args:
        num_data: K, at least 2.
        num_workers: N, at least 2; where it is less than K, only the last two layouts are made.

    Returns:
        Replication; for data nodes that are Chebyshev's and for uniform ones, worker nodes from repeated data nodes in
        steps of a quarter to systematic ones; Chebyshev's for both, and uniform ones for both.
    """
    layouts: dict[str, AbstractCode] = {}
    surplus = num_workers - num_data
    if surplus >= 0:
        layouts["replication"] = ReplicationCode(num_data, num_workers)
        for kind, alpha in (("Chebyshev", nodes.chebyshev_first(num_data)), ("uniform", nodes.uniform(num_data))):
            for num_between in sorted({round(share * surplus) for share in _SHARES_BETWEEN}):
                name = {0: "repeated", surplus: "systematic"}.get(num_between, f"{num_between} of {surplus} between")
                layout = nodes.mixed(alpha, num_workers, num_between)
                layouts[f"{kind}, {name}"] = SplineCode(layout.data, layout.workers)
    layouts["Chebyshev"] = SplineCode.chebyshev(num_data, num_workers)
    layouts["uniform"] = SplineCode(nodes.uniform(num_data), nodes.uniform(num_workers))
    return layouts


def standard_orders(
    f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]],
    x_sample: PyTree[ArrayLike],
    model_batch: int = 128,
) -> dict[str, Ordering | None]:
    """Makes the orders of a batch that `tune` tries, by name.

    Args:
        f: The model, as `jaxcode.coded` takes it.
        x_sample: Inputs, leaves (B, ...).
        model_batch: Inputs that the model is differentiated on at a time.

    Returns:
        The batch's own; by `ordering.greedy` on the inputs; and, of a model that has derivatives, on its `sensitivity`.
    """
    orders: dict[str, Ordering | None] = {"as given": None, "greedy": ordering.greedy}
    try:
        sensitivity = ordering.sensitivity(f, x_sample, model_batch=model_batch)
    except NO_DERIVATIVES:
        return orders
    features = sensitivity(x_sample)
    if jnp.all(jnp.isfinite(features)) and jnp.any(features != features[:1]):
        orders["greedy by sensitivity"] = ordering.Greedy(key=sensitivity)
    return orders


def _group_sample(x, targets, order, num_data):
    """Groups a sample and the model's answers to it, leaves (K, groups, ...), without an incomplete last group.

    The groups are in random order, so that the first of them represent all.
    """

    def order_of_inputs(tree, num_data):
        return order(tree[0], num_data)

    tree = jax.tree.map(jnp.asarray, (x, targets))
    grouped, grouping = group(tree, num_data, None if order is None else order_of_inputs)
    group_order = np.random.default_rng(0).permutation(grouping.size // num_data)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:, group_order], grouped)


def _prefer_copies(ranked: list[Trial]) -> Trial:
    """Chooses the best trial if it improves on the best of those that only copy inputs, else the latter."""
    copies = [trial for trial in ranked if trial.option.copies_only]
    if not copies:
        return ranked[0]
    best_copy = min(copies, key=lambda trial: trial.rank)
    return ranked[0] if ranked[0].measurement.improves_on(best_copy.measurement) else best_copy


def _candidate(trial: Trial) -> Candidate:
    option, measurement = trial.option, trial.measurement
    half_width = 1.96 * standard_error(measurement.losses)
    return Candidate(
        option.layout,
        option.order,
        measurement.code,
        measurement.output,
        float(measurement.losses.mean()),
        half_width,
        measurement.rmse,
        measurement.num_groups,
    )


def _is_classifier(targets):
    return isinstance(targets, np.ndarray) and targets.ndim == 2 and targets.shape[1] >= 2


def _output_spaces(targets) -> list[OutputSpace]:
    if not _is_classifier(targets) or not jnp.issubdtype(targets.dtype, jnp.floating):
        return [outputs.as_returned]
    values = np.asarray(targets, np.float64)
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-2):
        return [outputs.as_returned, outputs.logits]
    return [outputs.as_returned, outputs.probabilities]


def _check_candidates(layouts, orders, num_data, num_workers):
    if not layouts or not orders:
        raise ValueError(f"layouts has {len(layouts)} and orders {len(orders)} entries; expected at least one of each")
    for name, code in layouts.items():
        if not isinstance(code, AbstractCode):
            raise ValueError(
                f"layouts[{name!r}] is {code!r}; expected a code such as SplineCode.chebyshev(num_data, num_workers)"
            )
        if (code.num_data, code.num_workers) != (num_data, num_workers):
            raise ValueError(
                f"layouts[{name!r}] is a code of {code.num_data} inputs for {code.num_workers} workers; expected "
                f"{num_data} and {num_workers}"
            )
