"""Computes rounds of a distributed method: the work of machines, and one sum over them.

These functions take samples and do not return them, as XLA would copy them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .shards import Shards, real_rows
from .state import Common, Machine, State


@jax.jit
def begin(method: Any, params: PyTree[Array], shards: Shards, step_size: Float[Array, ""]) -> dict[str, Any]:
    """Returns the fields of the state before the first round, without samples."""
    w, unravel = ravel_pytree(params)
    rounds = jnp.zeros((), jnp.int32)
    common = Common(w, None, step_size, rounds, unravel, shards.num_samples)
    weights = shards.sizes.astype(w.dtype) / shards.num_samples
    machines = Machine(None, None, shards.samples, shards.sizes, weights)
    local, messages = jax.vmap(functools.partial(with_dtype(method, w.dtype).begin, common))(machines)
    return {
        "params": params,
        "message_sum": jnp.sum(messages, axis=0),
        "messages": messages,
        "local": local,
        "step_size": step_size,
        "round": rounds,
    }


@jax.jit
def advance(method: Any, state: State, key: PRNGKeyArray, active: Bool[Array, "machines"]) -> dict[str, Any]:
    """Returns the fields of the state after one more round, without samples."""
    w, unravel = ravel_pytree(state.params)
    method, data = with_dtype(method, w.dtype), state.data

    def work(replicated, messages, local, samples):
        """Returns sums over some machines, and each one's new local state and message."""
        method, w, message_sum, step_size, rounds, sizes, active, key = replicated
        common = Common(w, message_sum, step_size, rounds, unravel, data.num_samples)
        active_sizes = jnp.where(active, sizes, 0)
        total = jnp.maximum(jnp.sum(active_sizes, dtype=active_sizes.dtype), 1)
        # The quotient of two int32 would be float32, and half precision cannot hold large sizes.
        wide_dtype = max(w.dtype, jnp.dtype(jnp.float32), key=lambda dtype: dtype.itemsize)
        weights = (active_sizes.astype(wide_dtype) / total.astype(wide_dtype)).astype(w.dtype)
        round_key = jax.random.fold_in(key, rounds)

        def work_alone(message, local, samples, number):
            machine = Machine(message, local, samples, sizes[number], weights[number])
            move, local, new_message = method.work(common, machine, jax.random.fold_in(round_key, number))
            move = jnp.where(machine.active, machine.weight * move, 0)
            return move, local, jnp.where(machine.active, new_message, message)

        numbers = _numbers(method, messages.shape[0])
        moves, local, messages = jax.vmap(work_alone)(messages, local, samples, numbers)
        sums = jnp.concatenate([jnp.sum(moves, axis=0), jnp.sum(messages, axis=0)])
        return _sum_over_devices(method, sums), local, messages

    # Explicit axes do not allow closing over the numbers of the method.
    replicated = method, w, state.message_sum, state.step_size, state.round, data.sizes, active, key
    machines = PartitionSpec(_axis(method))
    sums, local, messages = _on_mesh(
        method, work, (PartitionSpec(), machines, machines, machines), (PartitionSpec(), machines, machines)
    )(replicated, state.messages, state.local, data.samples)
    changes = {
        "params": unravel(w + sums[: w.size]),
        "message_sum": sums[w.size :],
        "messages": messages,
        "local": local,
        "round": state.round + 1,
    }
    return {**state.without_data(), **changes}


@jax.jit
def advance_many(method: Any, state: State, key: PRNGKeyArray, count: Any, stragglers: Any) -> dict[str, Any]:
    """Returns the fields of the state after count more rounds, whose active machines are drawn by stragglers."""

    def advance_once(_, fields):
        current_state = dataclasses.replace(state, **fields)
        active = jnp.ones(method.num_machines, bool)
        if stragglers is not None:
            # Machines draw their samples with the numbers below num_machines.
            mask_key = jax.random.fold_in(jax.random.fold_in(key, current_state.round), method.num_machines)
            active = stragglers.sample(mask_key, method.num_machines)
        return advance(method, current_state, key, active)

    return jax.lax.fori_loop(0, count, advance_once, state.without_data())


@jax.jit
def objective(method: Any, params: PyTree[Array], data: Shards) -> Float[Array, ""]:
    """Computes the mean loss of all samples plus the ridge's term."""
    w, _ = ravel_pytree(params)

    def total(method, params, samples, sizes):
        losses = jax.vmap(jax.vmap(lambda sample: method.loss(params, sample)))(samples)
        is_sample = real_rows(losses.shape[1], sizes[_numbers(method, losses.shape[0])])
        return _sum_over_devices(method, jnp.sum(jnp.where(is_sample, losses, 0)))

    specs = PartitionSpec(), PartitionSpec(), PartitionSpec(_axis(method)), PartitionSpec()
    losses = _on_mesh(method, total, specs, PartitionSpec())(method, params, data.samples, data.sizes)
    return losses / data.num_samples + method.ridge / 2 * jnp.vdot(w, w)


def spread(method: Any, state: State) -> State:
    """Puts samples, local states and messages of machines on the devices of the method's mesh, if it has one."""
    mesh = method.mesh
    if mesh is None:
        return state

    def place(path, _):
        by_machine = path[0].name in ("messages", "local") or [key.name for key in path[:2]] == ["data", "samples"]
        return NamedSharding(mesh, PartitionSpec(*[mesh.axis_names[0]] * by_machine))

    return jax.device_put(state, jax.tree.map_with_path(place, state))


def with_dtype(method: Any, dtype: Any) -> Any:
    """Converts a method's numbers to the dtype of the parameters, which wider ones would widen."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), method)


def on_device(tree: PyTree[Any], mesh: Mesh | None = None) -> PyTree[Array]:
    """Puts numbers and arrays on the default device, or on all devices of a mesh.

    Transfers are explicit, so that a transfer guard lets them pass.
    """

    def put(leaf):
        if isinstance(leaf, Tracer) or (mesh is None and isinstance(leaf, jax.Array)):
            return leaf
        return jax.device_put(leaf, None if mesh is None else NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(put, tree)


def shapes_of(tree: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of arrays, without the devices on which they are."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _axis(method):
    return None if method.mesh is None else method.mesh.axis_names[0]


def _on_mesh(method, function, in_specs, out_specs):
    """Maps a function over the devices of the method's mesh and their machines; without a mesh, returns it as it is."""
    if method.mesh is None:
        return function
    # With the check, gradients with respect to what is the same on all devices would be summed over machines.
    return jax.shard_map(function, mesh=method.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _sum_over_devices(method, sums):
    return sums if method.mesh is None else jax.lax.psum(sums, _axis(method))


def _numbers(method, count):
    """Returns the numbers of machines on this device."""
    numbers = jnp.arange(count, dtype=jnp.int32)
    return numbers if method.mesh is None else jax.lax.axis_index(_axis(method)) * count + numbers
