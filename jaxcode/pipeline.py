"""Groups, encodes, decodes and ungroups a batch: the steps before and after the workers, for all that run a code.

A batch, leaves (B, ...), is cut into groups of K inputs. From there on every array has the members of a group in front
and the groups behind them: inputs and results are leaves (K, groups, ...), coded inputs and answers (N, groups, ...).
So a worker's share is one contiguous block, and a code is applied to all groups as one product of matrices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, final

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._arrays import pad
from ._pytree import pytree
from .allocation import Guesses, PriorPlanner, spread
from .checks import batch_size
from .codes import AbstractCode, Plan, Prior
from .codes.abstract import decode_as_planned
from .functions import check_answers
from .linops import AbstractLinop, apply_to_tree
from .linops.abstract import allow_transfers, prepare_eagerly
from .ordering import Ordering
from .outputs import OutputSpace, as_returned

# Answers that are decoded together, where those of all groups tell about each input: the time grows with their cube.
_BLOCK = 512

# From a code and one group of inputs, leaves (K, ...), to the group's plan; traced.
Planner = Callable[[AbstractCode, PyTree[Array]], Plan]


@final
@pytree("size", "num_data", "num_groups")
class Grouping:
    """Describes how a batch was cut into groups.

    Attributes:
        permutation: The index of the input at each position, shape (B,); None where inputs keep their order.
        size: B.
        num_data: K.
        num_groups: How many groups there are, the last one padded with its last input.
    """

    permutation: Int[Array, "batch"] | None
    size: int
    num_data: int
    num_groups: int


def group(x: PyTree[Array], num_data: int, order: Ordering | None) -> tuple[PyTree[Array], Grouping]:
    """Permutes a batch and cuts it into groups of consecutive inputs.

    Args:
        x: The batch, leaves (B, ...).
        num_data: K.
        order: From (x, K) to a permutation of the batch; no derivatives pass through it. If None, the batch keeps its
            order.

    Returns:
        Leaves (K, groups, ...), the last group padded with its last input; and the grouping.

    Raises:
        ValueError: If x has no leaves, its leading axes differ or are 0, or order does not return whole numbers (B,).
    """
    size = batch_size("x", x)
    permutation = None if order is None else _check_permutation(order(jax.lax.stop_gradient(x), num_data), size)
    grouping = Grouping(permutation, size, num_data, -(-size // num_data))

    def group_leaf(leaf):
        leaf = jnp.asarray(leaf)
        if permutation is not None:
            return leaf[_gather_index(grouping)]
        padded = pad(leaf, num_data * grouping.num_groups)
        return jnp.swapaxes(padded.reshape(grouping.num_groups, num_data, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(group_leaf, x), grouping


def ungroup(results: PyTree[Array], grouping: Grouping) -> PyTree[Array]:
    """Puts results, leaves (K, groups, ...), in the order of the batch, leaves (B, ...)."""

    def ungroup_leaf(leaf):
        feature_shape = leaf.shape[2:]
        if grouping.permutation is None:
            return jnp.swapaxes(leaf, 0, 1).reshape(-1, *feature_shape)[: grouping.size]
        index = jnp.arange(grouping.size, dtype=jnp.int32)
        position = jnp.zeros_like(index).at[grouping.permutation].set(index)
        member, number = position % grouping.num_data, position // grouping.num_data
        return leaf.reshape(-1, *feature_shape)[member * grouping.num_groups + number]

    return jax.tree.map(ungroup_leaf, results)


def make_plans(code: AbstractCode, planner: Planner | None, grouped: PyTree[Array]) -> Plan | None:
    """Plans every group.

    Args:
        code: The code.
        planner: From the code and one group to its plan; None for the code's own, if it needs one.
        grouped: Leaves (K, groups, ...).

    Returns:
        One plan whose leaves have the groups as leading axis; None without a planner.
    """
    if planner is None:
        if not code.needs_plan:
            return None
        return jax.vmap(code.plan, in_axes=1)(grouped)  # pyright: ignore[reportAttributeAccessIssue]
    return jax.vmap(functools.partial(planner, code), in_axes=1)(grouped)


def group_with_prior(
    code: AbstractCode, planner: PriorPlanner, x: PyTree[Array], order: Ordering | None
) -> tuple[PyTree[Array], Grouping, Plan]:
    """Guesses the answers to a batch, groups it and plans every group.

    Args:
        code: The code.
        planner: Has the prior.
        x: The batch, leaves (B, ...).
        order: As for `group`; if None, and the planner assigns inputs to workers, groups get equal shares of the risk.

    Returns:
        Leaves (K, groups, ...); the grouping; one plan whose leaves have the groups as leading axis.

    Raises:
        ValueError: As for `group`.
    """

    def order_batch(tree, num_data):
        x, guesses = tree
        return spread(guesses.risk, num_data) if order is None else order(x, num_data)

    in_own_order = order is None and planner.lost is None
    grouped, grouping = group((x, planner.guess(x)), code.num_data, None if in_own_order else order_batch)
    # Copies of the last input complete its group.
    position = np.arange(grouping.num_data)[:, None] + grouping.num_data * np.arange(grouping.num_groups)
    x, guesses = grouped
    return x, grouping, plan_groups(code, planner, x, guesses, position < grouping.size)


def plan_groups(
    code: AbstractCode,
    planner: PriorPlanner,
    grouped: PyTree[Array],
    guesses: Guesses,
    occupied: Bool[Array | np.ndarray, "data groups"],
) -> Plan:
    """Plans every group by the guesses for its inputs.

    Args:
        code: The code.
        planner: Has the prior.
        grouped: Leaves (K, groups, ...).
        guesses: Leaves (K, groups, ...).
        occupied: Which places hold inputs; the others' copies of inputs are not worth a worker.

    Returns:
        One plan whose leaves have the groups as leading axis.
    """
    guesses = guesses._replace(risk=jnp.where(occupied, guesses.risk, jnp.zeros((), guesses.risk.dtype)))
    return jax.vmap(functools.partial(planner.plan, code), in_axes=1)(grouped, guesses)


def encode(
    code: AbstractCode,
    encoder: AbstractLinop | None,
    grouped: PyTree[Array],
    plans: Plan | None = None,
    *,
    one_pass: bool = False,
) -> PyTree[Array]:
    """Encodes groups, leaves (K, groups, ...) to (N, groups, ...).

    Args:
        code: The code.
        encoder: Its encoder, or some rows of it; prepared if None. Not read with plans, each of which may change it.
        grouped: The inputs.
        plans: The plans of all groups, from `make_plans`.
        one_pass: As for `decode`.

    Raises:
        ValueError: If a dtype cannot be mixed.
        AssertionError: If the code's encoder does not give N coded inputs.
    """
    if plans is None:
        linop = code.encoder_linop() if encoder is None else encoder
        coded = apply_to_tree("x", linop, grouped, code.num_data, float64_fallback=False, one_pass=one_pass)
    else:
        coded = jax.vmap(code.encode, in_axes=(1, 0), out_axes=1)(grouped, plans)
    if encoder is None or plans is not None:
        chex.assert_tree_shape_prefix(coded, (code.num_workers,))
    return coded


def decode(
    code: AbstractCode,
    decoder: AbstractLinop | None,
    answers: PyTree[Array],
    output: OutputSpace,
    returned: Bool[Array | np.ndarray, "workers"] | None = None,
    plans: Plan | None = None,
    *,
    one_pass: bool = False,
) -> PyTree[Array]:
    """Decodes groups' answers as the model returned them, leaves (N, groups, ...), to results (K, groups, ...).

    Args:
        code: The code.
        decoder: Its decoder for the workers that returned; if None, it is prepared from `returned`.
        answers: The workers' answers.
        output: The space in which they are decoded.
        returned: Which workers returned; not read if there is a decoder and no plan.
        plans: The plans of all groups, from `make_plans`.
        one_pass: Whether to multiply all data as one product; see `apply_to_tree`.

    Raises:
        ValueError: If a dtype cannot be mixed.
        AssertionError: If the code's decoder does not give K results.
    """
    answers = output.transform(answers)
    if plans is None:
        if decoder is None:
            assert returned is not None
            decoder = code.decoder_linop(returned)
        if decoder.mixes:
            check_answers(answers, code.num_workers)
        results = apply_to_tree(
            "f's result", decoder, answers, code.num_workers, float64_fallback=False, one_pass=one_pass
        )
    else:
        assert returned is not None
        plans = transform_prior(plans, output)
        if code.adapts:
            results = _decode_jointly(code, answers, returned, plans)
        else:
            decode_group = functools.partial(decode_as_planned, code)
            results = jax.vmap(decode_group, in_axes=(1, None, 0), out_axes=1)(answers, returned, plans)
    chex.assert_tree_shape_prefix(results, (code.num_data,))
    return output.inverse_transform(results)


def _decode_jointly(code, answers, returned, plans):
    """Decodes groups, leaves (N, groups, ...), in blocks of groups whose answers tell about each other."""
    plans = code.adapt(answers, returned, plans)
    num_groups = jax.tree.leaves(answers)[0].shape[1]
    num_sites = code.num_workers if code.mixes else code.num_data
    num_blocks = -(-num_groups * num_sites // _BLOCK)
    block_size = -(-num_groups // num_blocks)

    def to_blocks(leaf, axis):
        """Cuts the groups, the last of them repeated, into blocks: leaves (blocks, ...)."""
        leaf = jnp.moveaxis(jnp.asarray(leaf), axis, 0)
        leaf = pad(leaf, num_blocks * block_size)
        return jnp.moveaxis(leaf.reshape(num_blocks, block_size, *leaf.shape[1:]), 1, axis + 1)

    def decode_block(block):
        answers, plans = block
        joined, plan = code.join(plans)
        mask = jnp.repeat(returned, block_size)
        results = decode_as_planned(joined, flatten_groups(answers), mask, plan)
        return unflatten_groups(results, code.num_data)

    blocks = (
        jax.tree.map(lambda leaf: to_blocks(leaf, 1), answers),
        jax.tree.map(lambda leaf: to_blocks(leaf, 0), plans),
    )
    results = jax.lax.map(decode_block, blocks)
    return jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(code.num_data, -1, *leaf.shape[3:])[:, :num_groups], results
    )


def predict_errors(
    code: AbstractCode,
    answers: PyTree[Array],
    returned: Bool[Array | np.ndarray, "workers"],
    output: OutputSpace,
    plans: Plan | None = None,
) -> Float[Array, "data groups"]:
    """Predicts each input's error from the answers that came.

    Args:
        code: One that predicts errors.
        answers: As for `decode`.
        returned: Which workers returned.
        output: The space in which answers are decoded.
        plans: The plans of all groups, from `make_plans`.

    Returns:
        The root mean square, over an input's outputs, of their standard errors in that space, shape (K, groups).
    """
    answers = output.transform(answers)
    if plans is None:
        _, errors = code.decode_with_error(answers, returned)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        decode_group = code.decode_with_error  # pyright: ignore[reportAttributeAccessIssue]
        plans = transform_prior(plans, output)
        _, errors = jax.vmap(decode_group, in_axes=(1, None, 0), out_axes=1)(answers, returned, plans)
    rows = [jnp.square(leaf).reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(errors)]
    return jnp.sqrt(jnp.mean(jnp.concatenate(rows, axis=-1), axis=-1))


def transform_prior(plans: Plan | None, output: OutputSpace) -> Plan | None:
    """Brings the prior of plans to the space in which answers are decoded; its errors are known in the model's."""
    if plans is None or plans.prior is None or output is as_returned:
        return plans
    prior = Prior(output.transform(plans.prior.workers), output.transform(plans.prior.data))
    return dataclasses.replace(plans, prior=prior)


def flatten_groups(tree: PyTree[Array | np.ndarray]) -> PyTree[Array | np.ndarray]:
    """Flattens members and groups to a model's batch, leaves (N, groups, ...) to (N groups, ...)."""
    return jax.tree.map(lambda leaf: leaf.reshape(math.prod(leaf.shape[:2]), *leaf.shape[2:]), tree)


def unflatten_groups(tree: PyTree[Array | np.ndarray], num_members: int) -> PyTree[Array | np.ndarray]:
    """Reshapes a model's batch, leaves (N groups, ...), to leaves (N, groups, ...)."""
    return jax.tree.map(lambda leaf: leaf.reshape(num_members, -1, *leaf.shape[1:]), tree)


@final
class StaticCode:
    """Wraps a static code so that it is hashable and compared by value, as a static argument of jitted functions is.

    Args:
        code: A code whose leaves are static.
    """

    def __init__(self, code: AbstractCode):
        self.code = code
        leaves, structure = jax.tree.flatten(code)
        arrays = [np.asarray(leaf) for leaf in leaves]
        self._key = structure, tuple((array.dtype.str, array.shape, array.tobytes()) for array in arrays)
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, StaticCode) and self._key == other._key)

    def __repr__(self) -> str:
        return f"StaticCode({describe_code(self.code)})"

    def __reduce__(self):
        # Without the hash, which differs between processes.
        return StaticCode, (self.code,)


def describe_code(code: AbstractCode) -> str:
    """Describes a code in one short line, without its nodes.

    >>> from jaxcode.codes import SplineCode
    >>> describe_code(SplineCode.systematic(num_data=20, num_workers=30))
    'InterpolatingCode(num_data=20, num_workers=30)'
    """
    return f"{type(code).__name__}(num_data={code.num_data}, num_workers={code.num_workers})"


def find_decoder(static_code: StaticCode, mask: bytes, x64: bool) -> AbstractLinop:
    """Finds or prepares the decoder of a static code and mask, as an argument of jitted functions.

    The latest decoders are cached. Most masks of many workers come once, so a decoder is in NumPy arrays at its first
    use, and is moved to the device, which takes time of its own, at the second. Where a transfer guard disallows NumPy
    arguments, it is moved at the first.

    Args:
        static_code: The code.
        mask: Which workers returned, bool (N,), as bytes.
        x64: Whether x64 is on. If it is off, jitted functions read the decoder in float32, the precision in which
            `decode` applies it.

    Returns:
        The decoder.
    """
    decoder = _prepare_decoder(static_code, mask, x64)
    # Where a mesh is set, arrays are made on its devices, and could not be used elsewhere.
    is_mesh_set = not jax.sharding.get_abstract_mesh().empty
    if decoder.on_device is not None and not is_mesh_set:
        return decoder.on_device
    guard = jax.config.jax_transfer_guard_host_to_device  # pyright: ignore[reportAttributeAccessIssue]
    if guard in (None, "allow") and (is_mesh_set or not decoder.is_used):
        decoder.is_used = True
        return decoder.on_host
    with jax.ensure_compile_time_eval(), allow_transfers():
        if is_mesh_set:
            return _put_on_mesh(decoder.on_host)
        linop = decoder.on_device = jax.device_put(decoder.on_host)
        return linop


# A jitted function puts its arguments on the devices of the mesh that is set.
_put_on_mesh = jax.jit(lambda tree: tree)


@dataclasses.dataclass(slots=True)
class _CachedDecoder:
    """Holds a decoder in NumPy arrays, whether it has been used, and the same on the device, if it is there."""

    on_host: AbstractLinop
    is_used: bool = False
    on_device: AbstractLinop | None = None


@functools.lru_cache(maxsize=256)
def _prepare_decoder(static_code, mask, _x64):
    return _CachedDecoder(prepare_eagerly(lambda: static_code.code.decoder_linop(np.frombuffer(mask, bool))))


def _gather_index(grouping):
    """Returns which input is member k of group g, shape (K, groups)."""
    position = np.arange(grouping.num_data)[:, None] + grouping.num_data * np.arange(grouping.num_groups)[None]
    return grouping.permutation[np.minimum(position, grouping.size - 1)]


def _check_permutation(permutation: Any, size: int) -> Array:
    permutation = jnp.asarray(permutation)
    if permutation.shape != (size,) or not jnp.issubdtype(permutation.dtype, jnp.integer):
        raise ValueError(
            f"order returned {permutation.dtype} of shape {permutation.shape} for a batch of {size}; "
            f"expected a permutation: whole numbers of shape ({size},)"
        )
    return permutation
