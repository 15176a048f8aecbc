"""Makes the options that tuning measures: layouts crossed with orders of the sample, without and with a prior."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._batched_model import BatchedModel
from ..allocation import PriorPlanner, assign, lost_probability, spread
from ..checks import batch_size as batch_size_of
from ..codes import AbstractCode, KernelCode, ReplicationCode
from ..functions import call
from ..ordering import Ordering
from ..outputs import OutputSpace
from ..pipeline import group
from ..stragglers import AbstractStragglers
from ..surrogates import Surrogate
from .answers import AnswerCache, PlannedAnswers
from .losses import Loss
from .regression import fit_by_leaving_out
from .trials import Option

_GUESS_BATCH = 128


def make_options(
    model: BatchedModel,
    x: PyTree[np.ndarray],
    targets: PyTree[np.ndarray],
    layouts: Mapping[str, AbstractCode],
    orders: Mapping[str, Ordering | None],
    *,
    batch_size: int,
    num_data: int,
    prior: Surrogate | None,
    stragglers: AbstractStragglers,
    loss: str,
) -> list[Option]:
    """Makes an option of each layout in each order, and with a prior one that decodes what it does not explain.

    Replication with a prior has copies where the prior is unsure, which takes no order.

    Args:
        model: The model.
        x: The sample, leaves (B, ...).
        targets: The model's answers to it, leaves (B, ...).
        layouts: Codes by name.
        orders: Orders of a batch by name, None for its own.
        batch_size: How many inputs are ordered together.
        num_data: K.
        prior: Guesses the answers; None for options without a prior only.
        stragglers: Which workers are late.
        loss: What a bad guess costs, for copies.

    Returns:
        The options, those without a prior first.
    """
    guess = guesses = None
    if prior is not None:
        guess = BatchedModel(call, prior, _GUESS_BATCH)
        guesses = BatchedModel(_guess_with(loss), prior, _GUESS_BATCH)(x)
    group_sample = functools.partial(_group_sample, batch_size=batch_size, num_data=num_data)
    options, options_with_prior = [], []
    planned = {layout: code for layout, code in layouts.items() if code.needs_plan}
    layouts = {layout: code for layout, code in layouts.items() if not code.needs_plan}
    for name, order in orders.items():
        grouped_x, grouped_targets, grouped_guesses = group_sample((x, targets, guesses), order)
        # One cache for options with and without a prior: the model answers the same coded inputs.
        cache = AnswerCache(model, grouped_x, grouped_targets)
        options += [Option(layout, name, code, cache) for layout, code in layouts.items()]
        if guess is not None:
            guess_cache = AnswerCache(guess, grouped_x, grouped_guesses.values)
            options_with_prior += [
                Option(layout, name, code, cache, guess_cache)
                for layout, code in layouts.items()
                if not isinstance(code, ReplicationCode)
            ]
    if planned:
        name = _order_of_planned(orders, batch_size, num_data)
        sample = group_sample((x, targets, guesses), orders[name], keep_batches=True)
        grouped_x, grouped_targets, grouped_guesses = sample
        for layout, code in planned.items():
            answers = PlannedAnswers(model, code, None, grouped_x, grouped_targets, None)
            options.append(Option(layout, name, code, None, planned=answers))
            if prior is not None:
                planner = PriorPlanner(prior, None, loss)
                answers = PlannedAnswers(model, code, planner, grouped_x, grouped_targets, grouped_guesses)
                options_with_prior.append(Option(layout, name, code, None, planned=answers))
    replications = {layout: code for layout, code in layouts.items() if isinstance(code, ReplicationCode)}
    if guess is not None and guesses is not None and replications:
        # The order reads the first element.
        risk, x, targets, values = group_sample((guesses.risk, x, targets, guesses.values), spread)
        caches = AnswerCache(model, x, targets), AnswerCache(guess, x, values)
        for layout, code in replications.items():
            lost = lost_probability(stragglers, code.num_workers)
            assignments = np.asarray(jax.vmap(assign, (1, None))(jnp.asarray(risk), lost))
            options_with_prior.append(Option(layout, "by risk", code, *caches, assignments, places_copies=True))
    return options + options_with_prior


def make_regressions(
    model: BatchedModel,
    x: PyTree[np.ndarray],
    targets: PyTree[np.ndarray],
    layouts: Mapping[str, KernelCode],
    orders: Mapping[str, Ordering | None],
    *,
    batch_size: int,
    prior: Surrogate | None,
    stragglers: AbstractStragglers,
    loss: Loss,
    loss_name: str,
    output: OutputSpace,
) -> list[Option]:
    """Makes options of kernel codes whose process is fitted to the sample, not to the answers of each batch.

    One has the mean answer as prior mean, and another a prior, if there is one, by whose risk copies are placed.

    Args:
        model: The model.
        x: The sample, leaves (B, ...) of real numbers.
        targets: The model's answers to it, leaves (B, ...) of floating-point numbers.
        layouts: Kernel codes of K and N by name.
        orders: As for `make_options`.
        batch_size: As for `make_options`.
        prior: As for `make_options`.
        stragglers: As for `make_options`.
        loss: The loss of one group.
        loss_name: What a bad guess costs, for copies.
        output: The space in which answers are decoded.

    Returns:
        The options, those without a prior first.
    """
    num_data = next(iter(layouts.values())).num_data
    group_sample = functools.partial(_group_sample, batch_size=batch_size, num_data=num_data, keep_batches=True)
    name = _order_of_planned(orders, batch_size, num_data)
    grouped_x, grouped_targets = group_sample((x, targets), orders[name])
    mean = jax.tree.map(lambda leaf: leaf.mean(axis=0, dtype=np.float64).astype(leaf.dtype), targets)
    means = jax.tree.map(lambda value, leaf: np.broadcast_to(value, leaf.shape), mean, grouped_targets)
    process = fit_by_leaving_out(grouped_x, grouped_targets, means, loss, output)
    options = []
    for layout, code in layouts.items():
        code = dataclasses.replace(code, process=process, mean=mean)
        answers = PlannedAnswers(model, code, None, grouped_x, grouped_targets, None)
        options.append(Option(layout, name, code, None, planned=answers, output=output))
    if prior is None:
        return options
    guesses = BatchedModel(_guess_with(loss_name), prior, _GUESS_BATCH)(x)
    # The orders read the first element.
    in_order = group_sample((x, targets, guesses), orders[name])
    by_risk = group_sample((guesses.risk, x, targets, guesses), spread)[1:]
    process = fit_by_leaving_out(by_risk[0], by_risk[1], by_risk[2].values, loss, output)
    for layout, code in layouts.items():
        code = dataclasses.replace(code, process=process)
        lost = lost_probability(stragglers, code.num_workers) if code.assigns else None
        sample, order_name = (by_risk, "by risk") if code.assigns else (in_order, name)
        answers = PlannedAnswers(model, code, PriorPlanner(prior, lost, loss_name), *sample)
        options.append(
            Option(layout, order_name, code, None, planned=answers, places_copies=code.assigns, output=output)
        )
    return options


def _order_of_planned(orders, batch_size, num_data):
    """Returns the name of the order for codes that read inputs where they lie.

    They do not depend on the order, but for which groups have similar inputs.
    """
    in_own_order = batch_size < 2 * num_data or "greedy" not in orders
    return next(iter(orders)) if in_own_order else "greedy"


def _group_sample(tree, order, *, batch_size, num_data, keep_batches=False):
    """Cuts a sample into batches and each of them, in an order of its first element, into groups.

    Returns:
        Leaves (K, groups, ...), without incomplete batches and groups. Groups are in random order, so that the first of
        them represent all. Or, where batches are to be kept, leaves (batches, K, groups, ...).
    """

    def order_of_first(tree, num_data):
        return order(tree[0], num_data)

    parts = []
    for start in range(0, batch_size_of("x_sample", tree) - batch_size + 1, batch_size):
        batch = jax.tree.map(lambda leaf, s=slice(start, start + batch_size): jnp.asarray(leaf[s]), tree)
        grouped, _ = group(batch, num_data, None if order is None else order_of_first)
        parts.append(jax.tree.map(lambda leaf: leaf[:, : batch_size // num_data], grouped))
    if keep_batches:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
    group_order = np.random.default_rng(0).permutation(len(parts) * (batch_size // num_data))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1)[:, group_order], *parts)


@functools.cache
def _guess_with(loss):
    """Returns one function for each loss, so that it compiles once."""
    return lambda prior, x: PriorPlanner(prior, None, loss).guess(x)
