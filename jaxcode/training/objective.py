"""Decodes batches under straggler sets, with derivatives by the code and by the prior."""

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ..allocation import PriorPlanner
from ..codes import AbstractCode
from ..codes.abstract import mixes_inputs
from ..functions import Params, PureFunction
from ..ordering import Ordering
from ..outputs import OutputSpace
from ..pipeline import decode, encode, flatten_groups, group, group_with_prior, make_plans, unflatten_groups, ungroup
from ..stragglers import AbstractStragglers
from ..surrogates import Surrogate
from ..surrogates.calibration import DISAGREEMENT
from ..surrogates.features import flatten_inputs
from ..surrogates.training import distillation_loss
from ..tuning.losses import LOSSES, squared_error

# Straggler sets that are decoded together, of codes that fit a process under each and of others.
_SETS_TOGETHER = 4, 32


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """Computes losses of decoded batches.

    Attributes:
        fn: The model without its parameters.
        order: In which order a batch is grouped.
        output: In which space answers are decoded.
        loss: The name of the loss.
        lost: The probability that c workers are all late, where copies are placed by the prior's risk; else None.
        scale: The unit of the answers.
    """

    fn: PureFunction
    order: Ordering | None
    output: OutputSpace
    loss: str
    lost: Float[Array, "counts"] | None
    scale: float

    def measured(
        self,
        code: AbstractCode,
        prior: Surrogate | None,
        params: Params,
        x: PyTree[Array],
        targets: PyTree[Array],
        masks: Bool[Array, "masks workers"],
    ) -> Float[Array, "masks groups"]:
        """Computes the loss of each group of a batch under each straggler set.

        Args:
            code: The code.
            prior: The prior.
            params: The model's parameters.
            x: The batch, leaves (B, ...).
            targets: The model's answers to it, leaves (B, ...).
            masks: Which workers return.

        Returns:
            The loss of K consecutive inputs each; those after the last K are left out.
        """
        results = self._results(code, prior, params, x, targets, masks)

        def cut(leaf, axis):
            num_groups = leaf.shape[axis] // code.num_data
            leaf = jax.lax.slice_in_dim(leaf, 0, num_groups * code.num_data, axis=axis)
            return leaf.reshape(*leaf.shape[:axis], num_groups, code.num_data, *leaf.shape[axis + 1 :])

        results = jax.tree.map(lambda leaf: cut(leaf, 1), results)
        targets = jax.tree.map(lambda leaf: cut(leaf, 0), targets)
        return jax.vmap(jax.vmap(LOSSES[self.loss]), in_axes=(0, None))(results, targets)

    def trained(
        self,
        code: AbstractCode,
        prior: Surrogate | None,
        params: Params,
        x: PyTree[Array],
        targets: PyTree[Array],
        masks: Bool[Array, "masks workers"],
    ) -> Float[Array, "masks"]:
        """Computes what training minimises: the squared error, or for classes the loss by which priors are distilled.

        Arguments as for `measured`; one number for each straggler set.
        """
        results = self._results(code, prior, params, x, targets, masks)

        def loss_of_set(results):
            if self.loss == DISAGREEMENT:
                return distillation_loss(flatten_inputs(results), flatten_inputs(targets), self.scale, True)
            return squared_error(results, targets) / self.scale**2

        return jax.vmap(loss_of_set)(results)

    def _results(self, code, prior, params, x, targets, masks):
        """Decodes a batch under straggler sets, leaves (masks, B, ...)."""
        if prior is None:
            grouped, grouping = group(x, code.num_data, self.order)
            plans = make_plans(code, None, grouped)
        else:
            planner = PriorPlanner(prior, self.lost, self.loss)
            grouped, grouping, plans = group_with_prior(code, planner, x, self.order)
        permutation = grouping.permutation
        regroup = None if permutation is None else lambda *_: permutation
        known, _ = group(targets, code.num_data, regroup)
        # The first workers may compute the inputs themselves, of which the answers are known.
        num_known = code.num_data if code.inputs_first else 0
        if not mixes_inputs(code) or num_known == code.num_workers:
            answers = encode(code, None, known, plans)
        else:
            coded = jax.tree.map(lambda leaf: leaf[num_known:], encode(code, None, grouped, plans))
            answers = self.fn(params, flatten_groups(coded))
            answers = unflatten_groups(answers, code.num_workers - num_known)
            if num_known:
                answers = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), known, answers)

        def decode_set(mask):
            return ungroup(decode(code, None, answers, self.output, mask, plans), grouping)

        fits_processes = code.adapts and getattr(code, "process", None) is None
        together = _SETS_TOGETHER[not fits_processes]
        if len(masks) <= together:
            return jax.vmap(decode_set)(masks)
        return jax.lax.map(decode_set, masks, batch_size=together)


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def draw_sets(
    num_sets: int, num_workers: int, stragglers: AbstractStragglers, has_prior: bool, key: PRNGKeyArray
) -> tuple[Bool[Array, "masks workers"], Bool[Array, "masks"]]:
    """Draws straggler sets.

    Args:
        num_sets: How many.
        num_workers: N.
        stragglers: Draws which workers return.
        has_prior: Whether a prior guesses what cannot be decoded.
        key: Random key.

    Returns:
        Which workers return, and which sets count. Without a prior, those with fewer than two answers, which determine
        no result, do not; all workers return then, so that no derivative is NaN.
    """
    masks = jax.vmap(lambda key: stragglers.sample(key, num_workers))(jax.random.split(key, num_sets))
    counts = jnp.sum(masks, axis=1) >= (0 if has_prior else 2)
    return masks | ~counts[:, None], counts


def split_batches(tree: PyTree[Any], batch_size: int, num_batches: int) -> PyTree[np.ndarray]:
    """Cuts a sample into consecutive batches, leaves (batches, batch_size, ...)."""

    def split(leaf):
        return np.asarray(leaf)[: num_batches * batch_size].reshape(num_batches, batch_size, *leaf.shape[1:])

    return jax.tree.map(split, tree)
