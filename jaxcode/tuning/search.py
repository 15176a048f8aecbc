"""Chooses the code, order and output space for a model by measurement on a sample of its inputs, without labels."""

import functools
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray, PyTree

from .. import nodes, ordering, outputs
from .._batched_model import BatchedModel
from .._side_input import is_side_input
from ..checks import batch_size as batch_size_of
from ..checks import check_count, is_real
from ..codes import AbstractCode, KernelCode, LagrangeCode, ReplicationCode, SplineCode
from ..codes.abstract import mixes_inputs
from ..functions import NO_DERIVATIVES, Model, as_pure_function
from ..linops.application import is_mixable
from ..ordering import Ordering
from ..outputs import OutputSpace
from ..stragglers import AbstractStragglers
from ..surrogates import Surrogate
from ..surrogates.calibration import DISAGREEMENT, SQUARED_ERROR
from .evaluation import Evaluator, standard_error
from .losses import LOSSES, Loss
from .options import make_options, make_regressions
from .report import Candidate, Tuned
from .trials import Trial, measure, merge, select

__all__ = ["kernel_layouts", "standard_layouts", "standard_orders", "tune"]

# The shares of the N - K surplus workers whose nodes lie between data nodes; the others' repeat data nodes. Smooth
# models gain from the former, rough ones from the latter; each further share is one more candidate in every order.
_SHARES_BETWEEN = (0.0, 0.25, 0.5, 0.75, 1.0)
# Degrees of models that Lagrange codes make exact; higher ones need more workers than there are.
_DEGREES = (1, 2)
# Errors of the best curve, over those of replication whose lost inputs are the mean, between which kernel codes are
# worth trying.
_EXACT, _SMOOTH = 1e-5, 0.7
# Lengths by which kernel codes place workers, in units of a group's extent.
_LENGTHS = (0.15, 0.3, 0.6)
# Name of replication whose lost inputs are predicted by a process fitted to the sample.
_REGRESSION = "copies, regression"


def tune(
    f: Model,
    x_sample: PyTree[ArrayLike],
    num_data: int,
    num_workers: int,
    stragglers: AbstractStragglers,
    *,
    prior: Surrogate | None = None,
    batch_size: int | None = None,
    loss: str | Loss = SQUARED_ERROR,
    layouts: Mapping[str, AbstractCode] | None = None,
    orders: Mapping[str, Ordering | None] | None = None,
    num_masks: int = 256,
    model_batch: int = 128,
    key: PRNGKeyArray | None = None,
    time_limit: float = 600.0,
    progress: bool = True,
) -> Tuned:
    """Chooses the code that loses least for a model, its inputs and its stragglers.

    What coding loses depends on the model: a smooth one gains from workers that sit between the inputs, a rough one
    only from second copies of them, from which the curve fills in lost answers. So it is measured. Candidates are node
    layouts, from replication to the paper's, crossed with orders of the batch and with the spaces in which
    probabilities can be decoded; and all of them with a prior, if one is given, of which replication with copies for
    the inputs whose guesses are worst is one. Replication is also tried with its lost inputs predicted from the other
    answers of the batch: by a Gaussian process over the inputs (`KernelCode` that does not mix), of which smoothness,
    length and noise are those that predict answers of the sample best from others. All candidates decode under the same
    straggler sets, and are compared with what the model itself answers to the sample; no labels are needed.

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
        x_sample: Inputs as they will come, leaves (B, ...), at least two groups of num_data; a few hundred are enough.
            With a prior, others than those that it was distilled from, of which its guesses are better.
        num_data: K, inputs coded together, at least 2.
        num_workers: N, at least 2.
        stragglers: Which workers are late, such as `jaxcode.stragglers.Uniform(5)`.
        prior: Guesses f's answers, such as `jaxcode.surrogate(f, inputs)`; candidates are then tried without and with
            it. None to try none.
        batch_size: How many inputs come at a time, which are ordered together: B of `jaxcode.coded`. One group,
            num_data, if not given; at most the sample.
        loss: The number to be lowered: "squared_error", of what the model returns; "disagreement", for a classifier,
            the share of inputs that get another class than the model gives them; or a function of results and the
            model's own answers, leaves (K, ...), traced, under vmap. An input that a code loses has the result NaN: it
            counts as a disagreement, and makes any other loss infinite.
        layouts: Candidates by name, codes of K and N. If not given, `standard_layouts`, replication by a fitted process
            where inputs and answers are numbers, and, where curves tell that the model is smooth on the scale of a
            group, `kernel_layouts`. Kernel codes that fit a process to the answers of each batch are also tried with
            one fitted to the sample. Smoothing is tuned for those whose interpolants have it. With a prior, inputs that
            cannot be mixed, such as tokens, get replication alone.
        orders: Orders of the batch by name, None for its own; `standard_orders` if not given.
        num_masks: Straggler sets to average over, at least 2. Those with fewer than two answers, from which no curve
            can be decoded, are left out.
        model_batch: Inputs that the model runs on at a time, and is differentiated on.
        key: Random key of the straggler sets.
        time_limit: Seconds after which no further candidate is measured; those that only copy inputs always are.
        progress: Whether to show a progress bar on standard error.

    Returns:
        The choice, with `coded(f)` to use it, and `table()` and `plot()` to see what it was chosen from.

    Raises:
        ValueError: If the sample is shorter than two groups, numbers are not whole or too small, batch_size is less
            than a group, loss is unknown or needs class scores that the model does not return, prior is no surrogate or
            cannot estimate the loss, stragglers is no straggler model or leaves fewer than two answers in all sets,
            there is no layout or no order, a layout is no code of K and N, an order returns no permutation, f is no
            model, its results do not have the batch as leading axis, or inputs or answers are no real numbers where a
            layout mixes them.

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
    size = batch_size_of("x_sample", x_sample)
    if size < 2 * num_data:
        raise ValueError(f"x_sample has {size} inputs; expected at least two groups of num_data, {2 * num_data}")
    if not isinstance(stragglers, AbstractStragglers):
        raise ValueError(f"stragglers is {stragglers!r}; expected a model such as jaxcode.stragglers.Uniform(5)")
    if prior is not None and not isinstance(prior, Surrogate):
        raise ValueError(f"prior is {prior!r}; expected a surrogate, such as jaxcode.surrogate(f, inputs)")
    coded = [node for node in jax.tree.leaves(x_sample, is_leaf=is_side_input) if not is_side_input(node)]
    copies_only = prior is not None and not all(map(is_mixable, map(np.asarray, coded)))
    if orders is None:
        orders = {"as given": None} if copies_only else standard_orders(f, x_sample, model_batch)
    tries_kernels = layouts is None and not copies_only and num_workers >= num_data
    kernels = {name: code for name, code in (layouts or {}).items() if isinstance(code, KernelCode)}
    if layouts is None:
        layouts = standard_layouts(num_data, num_workers)
        if copies_only:
            layouts = {name: code for name, code in layouts.items() if not mixes_inputs(code)}
    _check_candidates(layouts, orders, num_data, num_workers)

    batch_size = min(size, check_count("batch_size", num_data if batch_size is None else batch_size, least=num_data))
    deadline = time.monotonic() + time_limit
    x_sample = jax.tree.map(np.asarray, x_sample)
    mixes = any(mixes_inputs(code) for code in layouts.values())
    model = BatchedModel(*as_pure_function(f), min(model_batch, size), allow_integers=not mixes)
    targets = model(x_sample)
    loss_function = _find_loss(loss, targets)
    masks = _sample_masks(stragglers, num_workers, num_masks, key)

    num_groups = size // batch_size * (batch_size // num_data)
    if num_groups < 2:
        raise ValueError(
            f"x_sample has {size} inputs; expected at least two groups of num_data, {num_data}, in whole batches of "
            f"batch_size, {batch_size}"
        )
    loss_name = loss if isinstance(loss, str) else SQUARED_ERROR
    make_options_of = functools.partial(
        make_options,
        model,
        x_sample,
        targets,
        orders=orders,
        batch_size=batch_size,
        num_data=num_data,
        prior=prior,
        stragglers=stragglers,
        loss=loss_name,
    )
    evaluator, output_spaces = Evaluator(masks, loss_function, num_groups), _output_spaces(targets)
    ranked = select(evaluator, make_options_of(layouts), output_spaces, num_groups, deadline, progress)
    layouts_to_fit = _to_fit(kernels)
    if tries_kernels and time.monotonic() < deadline:
        layouts_to_fit = {_REGRESSION: KernelCode(num_data, num_workers, mixes=False)}
        if _is_smooth(ranked, targets, num_data, masks):
            kernels = kernel_layouts(num_data, num_workers, late=1 - float(np.mean(masks)))
            if batch_size < 2 * num_data:
                # Requests may differ from each other in scale: a process is fitted to the answers of each as well.
                trials = select(evaluator, make_options_of(kernels), output_spaces, num_groups, deadline, progress)
                ranked = merge((ranked, trials), num_groups)
            if num_workers > num_data:
                layouts_to_fit |= _to_fit(kernels)
    if layouts_to_fit and _are_numbers(x_sample, targets):
        regressions = make_regressions(
            model,
            x_sample,
            targets,
            layouts_to_fit,
            orders,
            batch_size=batch_size,
            prior=prior,
            stragglers=stragglers,
            loss=loss_function,
            loss_name=loss_name,
            output=output_spaces[-1],
        )
        trials = [
            measure(evaluator, option, output_spaces, num_groups)
            for option in regressions
            if option.copies_only or time.monotonic() < deadline
        ]
        ranked = merge((ranked, trials), num_groups)
    chosen = _prefer_copies(ranked)
    ranked.sort(key=lambda trial: trial is not chosen)
    has_prior, places_copies = chosen.option.has_prior, chosen.option.places_copies
    return Tuned(
        chosen.measurement.code,
        orders.get(chosen.option.order),
        chosen.measurement.output,
        prior if has_prior else None,
        stragglers if places_copies else None,
        loss_name,
        tuple(_candidate(trial, prior) for trial in ranked),
        model.count,
    )


def standard_layouts(num_data: int, num_workers: int) -> dict[str, AbstractCode]:
    """Makes the layouts that `tune` tries, by name.

    Args:
        num_data: K, at least 2.
        num_workers: N, at least 2; where it is less than K, only Chebyshev's and uniform nodes are made.

    Returns:
        Replication; for data nodes that are Chebyshev's and for uniform ones, worker nodes from repeated data nodes in
        steps of a quarter to systematic ones; Chebyshev's for both, and uniform ones for both; and Lagrange codes of
        degrees 1 and 2, exact for such models, where there are enough workers.
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
    for degree in _DEGREES:
        if (num_data - 1) * degree < num_workers:
            layouts[f"Lagrange, degree {degree}"] = LagrangeCode.chebyshev(num_data, num_workers, degree=degree)
    return layouts


def kernel_layouts(num_data: int, num_workers: int, *, late: float = 0.1) -> dict[str, KernelCode]:
    """Makes kernel codes for `tune` to try, by name.

    They take longer to measure than others, because a process is fitted under every straggler set, and are worth it
    where models are smooth on the scale of a group.

    Args:
        num_data: K, at least 2.
        num_workers: N, at least K.
        late: The share of workers that are late, such as S / N.

    Returns:
        Kernel codes that mix, for models of several lengths; of the inputs alone where N is K.
    """
    if num_workers == num_data:
        return {"kernel": KernelCode(num_data, num_workers, mixes=False)}
    return {f"kernel, length {length}": KernelCode(num_data, num_workers, length, late) for length in _LENGTHS}


def standard_orders(
    f: Model,
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


def _is_smooth(ranked: list[Trial], targets: PyTree[np.ndarray], num_data: int, masks) -> bool:
    """Returns whether curves tell more about the inputs that replication loses than the mean answer, but not all."""
    replication = ReplicationCode(num_data, masks.shape[1])
    share_lost = 1 - float(jnp.mean(jax.vmap(replication.recovered)(jnp.asarray(masks))))
    variance = sum(np.var(leaf, axis=0).sum() for leaf in jax.tree.leaves(targets))
    error_of_mean = np.sqrt(share_lost * variance)
    errors = [trial.measurement.rmse for trial in ranked if not (trial.option.copies_only or trial.option.has_prior)]
    return bool(errors) and bool(_EXACT * error_of_mean < min(errors) < _SMOOTH * error_of_mean)


def _to_fit(kernels: Mapping[str, KernelCode]) -> dict[str, KernelCode]:
    """Returns, by another name, those codes whose process is to be fitted."""
    return {f"{name}, fitted": code for name, code in kernels.items() if code.process is None and code.mean is None}


def _prefer_copies(ranked: list[Trial]) -> Trial:
    """Chooses the best trial if it improves on the best of those that only copy inputs, else the latter.

    Among these, too, one that predicts lost inputs from others has to improve on one that does not.
    """
    copies = [trial for trial in ranked if trial.option.copies_only]
    plain_copies = [trial for trial in copies if trial.option.planned is None]
    chosen = None
    for trials in filter(None, (plain_copies, copies, ranked)):
        best = _find_best(trials)
        if chosen is None or best.measurement.improves_on(chosen.measurement):
            chosen = best
    assert chosen is not None
    return chosen


def _find_best(ranked: list[Trial]) -> Trial:
    """Finds the best trial; those measured under fewer straggler sets are compared under these."""
    num_masks = max(len(trial.measurement.losses) for trial in ranked)
    num_groups = max(trial.measurement.num_groups for trial in ranked)
    complete = [trial for trial in ranked if trial.measurement.num_groups == num_groups]
    best, *others = sorted(complete, key=lambda trial: (len(trial.measurement.losses) < num_masks, trial.rank))
    for trial in others:
        if trial.measurement.is_better(best.measurement):
            best = trial
    return best


def _candidate(trial: Trial, prior: Surrogate | None) -> Candidate:
    option, measurement = trial.option, trial.measurement
    code, work, prior_name = measurement.code, float(measurement.code.num_workers), ""
    if prior is not None and option.has_prior:
        prior_name = "prior, copies by risk" if option.places_copies else "prior"
        # The inputs' guesses; and those of the coded inputs, which are no copies.
        work += prior.cost * (code.num_data + (0 if option.copies_only else code.num_workers))
    half_width = 1.96 * standard_error(measurement.losses)
    return Candidate(
        option.layout,
        option.order,
        prior_name,
        code,
        measurement.output,
        float(measurement.losses.mean()),
        half_width,
        measurement.rmse,
        work,
        measurement.num_groups,
    )


def _find_loss(loss: str | Loss, targets: PyTree[np.ndarray]) -> Loss:
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; expected one of {', '.join(LOSSES)}, or a function of results and targets")
    if loss == DISAGREEMENT and not _is_class_scores(targets):
        shapes = jax.tree.map(np.shape, targets)
        raise ValueError(
            f"loss is {loss!r}, but f returned {shapes}; expected one array of scores of at least two classes"
        )
    return LOSSES[loss]


def _sample_masks(stragglers, num_workers, num_masks, key):
    keys = jax.random.split(jax.random.key(0) if key is None else key, num_masks)
    masks = jax.vmap(lambda key: stragglers.sample(key, num_workers))(keys)
    masks = masks[np.asarray(masks).sum(axis=1) >= 2]
    if len(masks) < 2:
        raise ValueError(
            f"stragglers is {stragglers!r}, which leaves fewer than two answers of {num_workers} in all but "
            f"{len(masks)} of {num_masks} sets; expected more that return"
        )
    return masks


def _is_class_scores(targets):
    return isinstance(targets, np.ndarray) and targets.ndim == 2 and targets.shape[1] >= 2


def _are_numbers(x: PyTree[np.ndarray], targets: PyTree[np.ndarray]) -> bool:
    """Returns whether inputs are real numbers, and answers floating-point ones, so that distances tell about them."""
    return all(is_real(leaf.dtype) for leaf in jax.tree.leaves(x)) and all(
        jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(targets)
    )


def _output_spaces(targets) -> list[OutputSpace]:
    """Lists the spaces from which results come back as the model returns them, in all digits if nobody is late."""
    if not _is_class_scores(targets) or not jnp.issubdtype(targets.dtype, jnp.floating):
        return [outputs.as_returned]
    values = np.asarray(targets, np.float64)
    tolerance = 4 * values.shape[1] * float(jnp.finfo(targets.dtype).eps)
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=tolerance):
        return [outputs.as_returned, outputs.logits]
    return [outputs.as_returned]


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
