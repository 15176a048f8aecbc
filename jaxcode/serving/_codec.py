"""Encodes and decodes batches on the host's device: module-level programs, compiled once for all servers alike."""

import dataclasses
import functools
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..allocation import PriorPlanner
from ..codes import Plan
from ..codes.abstract import find_assignment
from ..ordering import Ordering
from ..outputs import OutputSpace
from ..pipeline import (
    Grouping,
    StaticCode,
    decode,
    encode,
    find_decoder,
    flatten_groups,
    group,
    make_plans,
    plan_groups,
    predict_errors,
    transform_prior,
    unflatten_groups,
    ungroup,
)
from ..robust import Defence, Detection
from ..robust.detection import detect, keeps_evidence
from ._layout import Layout, lay_out


@final
@dataclasses.dataclass(eq=False)
class EncodedBatch:
    """Holds a batch in groups.

    Attributes:
        layout: The places of its inputs.
        grouped: Its inputs, leaves (K, groups, ...); None if the server needs no plans.
        coded_inputs: Those that need no plan, leaves (N, groups, ...) or the first K of them.
        plans: The plans of all groups, once they are made; None for codes and servers that need none.
        assignment: Which input each worker serves, (N, groups), of replication; else None.
        risk: What each input costs if it is lost, (K, groups), of replication: 1, or as planned with a prior.
    """

    layout: Layout
    grouped: PyTree[Array] | None
    coded_inputs: PyTree[np.ndarray]
    plans: Plan | None = None
    assignment: Int[np.ndarray, "workers groups"] | None = None
    risk: Float[np.ndarray, "data groups"] | None = None


@final
class Codec:
    """Encodes batches and decodes answers, from NumPy arrays to NumPy arrays.

    Args:
        static_code: The code.
        order: As for `jaxcode.coded`.
        output: The space in which answers are decoded, as for `jaxcode.coded`.
        defence: Detects faulty workers, as for `jaxcode.coded`.
        planner: Has the prior, or one of the same structure; None without one.
        x64: Whether x64 is on where the methods are called.

    Attributes:
        needs_plans: Whether groups are planned.
        has_worth: Whether `worth` can be computed, as each worker computes one input.
        num_planned: How many of the N coded inputs need a plan, the last ones.
        gathers_evidence: Whether the defence takes what earlier requests say about workers.
        rounds: Whether the number of groups is rounded up to a power of two.
    """

    def __init__(
        self,
        static_code: StaticCode,
        order: Ordering | None,
        output: OutputSpace,
        defence: Defence | None,
        planner: PriorPlanner | None,
        x64: bool,
    ):
        self._code, self._order, self._output, self._defence, self._x64 = static_code, order, output, defence, x64
        code = static_code.code
        self.rounds, self.gathers_evidence = not code.adapts, keeps_evidence(defence)
        self.needs_plans = code.needs_plan or planner is not None
        self.has_worth = code.assigns
        self._first_are_inputs = code.needs_plan or (planner is not None and planner.lost is not None)
        self.num_planned = code.num_workers - code.num_data if self._first_are_inputs else 0

    def encode(self, padded: PyTree[np.ndarray], finite: Bool[np.ndarray, "batch"]) -> EncodedBatch:
        """Encodes a padded batch: those coded inputs that need no plan.

        Args:
            padded: The finite inputs as `pad_inputs` returns them, leaves (places, ...).
            finite: Which inputs of the batch are encoded, shape (B,).

        Returns:
            The batch in groups.
        """
        num_data = self._code.code.num_data
        padded = jax.device_put(padded)
        permutation = None if self._order is None else jax.device_get(_permute(self._order, num_data, padded))
        layout = lay_out(finite, num_data, permutation, rounds=self.rounds)
        index = jax.device_put(layout.index)
        grouped = _group(num_data, padded, index) if self.needs_plans else None
        coded_inputs = grouped if self._first_are_inputs else _encode(self._code, padded, index)
        batch = EncodedBatch(layout, grouped, jax.device_get(coded_inputs))
        if self.has_worth:
            batch.risk = layout.occupied.astype(np.float32)
            # Without a plan only those workers have work that compute their own inputs under any.
            num_workers = self._code.code.num_workers
            assignment = np.arange(num_workers) % num_data if self.needs_plans else _find_assignment(self._code)
            batch.assignment = np.broadcast_to(assignment[:, None], (num_workers, batch.risk.shape[1]))
        return batch

    def plan(self, batch: EncodedBatch, planner: PriorPlanner | None) -> PyTree[np.ndarray] | None:
        """Plans the groups of a batch.

        Args:
            batch: The batch, whose plans are set.
            planner: Has the prior; None without one.

        Returns:
            The coded inputs that need a plan, leaves (num_planned, groups, ...); None if there are none.
        """
        occupied = jax.device_put(batch.layout.occupied)
        batch.plans, risk, assignment, others = _plan(self._code, self.num_planned, planner, batch.grouped, occupied)
        if self.has_worth:
            batch.risk, batch.assignment = jax.device_get((risk, assignment))
        return None if others is None else jax.device_get(others)

    def detect(
        self,
        answers: PyTree[np.ndarray],
        returned: Bool[np.ndarray, "workers"],
        batch: EncodedBatch,
        evidence: Float[np.ndarray | Array, "machines"] | None,
        worker: Int[np.ndarray, "workers"],
    ) -> Detection | None:
        """Detects faulty workers.

        Args:
            answers: What workers answered, leaves (N, groups, ...).
            returned: Which workers returned.
            batch: The batch. Groups that hold none of its inputs repeat others, and are no further evidence.
            evidence: What earlier requests say about each worker of the pool, for defences that gather it.
            worker: Which of them gave each answer, -1 for none, (N,).

        Returns:
            The detection, in NumPy arrays; None without a defence.
        """
        if self._defence is None:
            return None
        # A power of two, so that few programs are compiled.
        num_examined = 1 << (batch.layout.num_occupied.bit_length() - 1)
        examined = jax.device_put(jax.tree.map(lambda leaf: leaf[:, :num_examined], answers))
        history = None, None, None
        if self.gathers_evidence:
            plans = None if batch.plans is None else _take_groups(num_examined, batch.plans)
            history = plans, *jax.device_put((evidence, worker.astype(np.int32)))
        arguments = examined, jax.device_put(returned), *history
        return jax.device_get(_detect(self._code, self._output, self._defence, *arguments))

    def decode(
        self, answers: PyTree[np.ndarray], returned: Bool[np.ndarray, "workers"], batch: EncodedBatch
    ) -> PyTree[np.ndarray]:
        """Decodes answers, leaves (N, groups, ...).

        Args:
            answers: What workers answered.
            returned: Whose answers are decoded.
            batch: The batch.

        Returns:
            Results, leaves (places, ...).
        """
        answers = jax.device_put(answers)
        if batch.plans is None:
            decoder = find_decoder(self._code, returned.tobytes(), self._x64)
            return jax.device_get(_decode(self._code, self._output, decoder, answers))
        returned = jax.device_put(returned)
        return jax.device_get(_decode_planned(self._code, self._output, answers, returned, batch.plans))

    def predict_errors(
        self, answers: PyTree[np.ndarray], returned: Bool[np.ndarray, "workers"], batch: EncodedBatch
    ) -> Float[np.ndarray, "places"]:
        """Predicts the error of each result from answers, leaves (N, groups, ...)."""
        arguments = jax.device_put((answers, returned))
        return jax.device_get(_predict_errors(self._code, self._output, *arguments, batch.plans))

    def worth(self, returned: Bool[np.ndarray, "workers"], batch: EncodedBatch) -> Float[np.ndarray, "workers"]:
        """Computes by how much an answer of each worker would lower a batch's expected loss, of replication.

        It is the sum of the risks of the worker's inputs that no worker has answered.
        """
        assert batch.assignment is not None
        assert batch.risk is not None
        group = np.arange(batch.risk.shape[1])[None]
        is_answered = np.zeros(batch.risk.shape, bool)
        is_answered[batch.assignment[returned], group] = True
        return np.where(is_answered, 0, batch.risk)[batch.assignment, group].sum(axis=1)

    def find_exact(self, returned: Bool[np.ndarray, "workers"], batch: EncodedBatch) -> Bool[np.ndarray, "places"]:
        """Finds the results that are f's answers to the inputs themselves."""
        if batch.plans is None:
            return np.resize(np.asarray(self._code.code.exact(returned)), len(batch.layout.index))
        return jax.device_get(_find_exact(self._code, jax.device_put(returned), batch.plans))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _permute(order, num_data, x):
    """Returns the permutation of a batch, checked by `pipeline.group`."""
    return group(x, num_data, order)[1].permutation


@functools.partial(jax.jit, static_argnums=0)
def _group(num_data, x, index):
    """Groups inputs, leaves (inputs, ...); `index` has the input of each place, shape (places,)."""
    return group(jax.tree.map(lambda leaf: leaf[index], x), num_data, None)[0]


@functools.partial(jax.jit, static_argnums=0)
def _encode(static_code, x, index):
    """Encodes inputs, leaves (inputs, ...), in groups, as `_group` makes them."""
    return encode(static_code.code, None, _group(static_code.code.num_data, x, index))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _plan(static_code, num_planned, planner, grouped, occupied):
    """Plans all groups.

    Returns:
        The plans; the risks of their inputs, (K, groups); which inputs workers compute, (N, groups), None where these
        are sums; and the last coded inputs, leaves (num_planned, ...), None if num_planned is 0.
    """
    code = static_code.code
    if planner is None:
        plans, risk = make_plans(code, None, grouped), occupied.astype(jnp.float32)
    else:
        guesses = unflatten_groups(planner.guess(flatten_groups(grouped)), code.num_data)
        risk = jnp.where(occupied, guesses.risk, 0)
        plans = plan_groups(code, planner, grouped, guesses, occupied)
    assignment = jax.vmap(lambda plan: find_assignment(code, plan), out_axes=1)(plans) if code.assigns else None
    others = encode(code, None, grouped, plans) if num_planned else None
    return plans, risk, assignment, jax.tree.map(lambda leaf: leaf[-num_planned:], others)


@functools.lru_cache
def _find_assignment(static_code):
    """Returns which input each worker computes, (N,)."""
    return np.asarray(find_assignment(static_code.code))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(static_code, output, decoder, answers):
    """Decodes answers, leaves (N, groups, ...), to results, leaves (places, ...)."""
    return _to_places(decode(static_code.code, decoder, answers, output))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_planned(static_code, output, answers, returned, plans):
    return _to_places(decode(static_code.code, None, answers, output, returned, plans))


@functools.partial(jax.jit, static_argnums=0)
def _find_exact(static_code, returned, plans):
    """Finds exact results, shape (places,)."""
    return jax.vmap(lambda plan: static_code.code.exact(returned, plan))(plans).reshape(-1)


@functools.partial(jax.jit, static_argnums=0)
def _take_groups(count, plans):
    """Returns the plans of the first groups."""
    return jax.tree.map(lambda leaf: leaf[:count], plans)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _detect(static_code, output, defence, answers, returned, plans, evidence, worker):
    answers, plans = output.transform(answers), transform_prior(plans, output)
    return detect(defence, static_code.code, answers, returned, plans=plans, evidence=evidence, worker=worker)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict_errors(static_code, output, answers, returned, plans):
    """Predicts the errors of results, shape (places,)."""
    return predict_errors(static_code.code, answers, returned, output, plans).T.reshape(-1)


def _to_places(results):
    """Brings results of groups, leaves (K, groups, ...), to their places, leaves (places, ...)."""
    num_data, num_groups = jax.tree.leaves(results)[0].shape[:2]
    return ungroup(results, Grouping(None, num_data * num_groups, num_data, num_groups))
