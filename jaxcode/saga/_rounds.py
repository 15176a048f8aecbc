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

from .shards import Shards, sample_mask
from .state import Common, Machine, State


@jax.jit
def begin(method: Any, params: PyTree[Array], shards: Shards, step_size: Float[Array, ""]) -> dict[str, Any]:
    """Returns the fields of the state before the first round, without samples."""
    w, unravel = ravel_pytree(params)
    round_number = jnp.zeros((), jnp.int32)
    common = Common(w, None, step_size, round_number, unravel, shards.num_samples)
    weights = shards.sizes.astype(w.dtype) / shards.num_samples
    machines = Machine(None, None, shards.samples, shards.sizes, weights)
    local, messages = jax.vmap(functools.partial(cast(method, w.dtype).begin, common))(machines)
    return {
        "params": params,
        "message_sum": jnp.sum(messages, axis=0),
        "messages": messages,
        "local": local,
        "step_size": step_size,
        "round": round_number,
    }


@jax.jit
def advance(method: Any, state: State, key: PRNGKeyArray, active: Bool[Array, "machines"]) -> dict[str, Any]:
    """Returns the fields of the state after one more round, without samples."""
    w, unravel = ravel_pytree(state.params)
    method, data = cast(method, w.dtype), state.data

    def work_on_device(replicated_values, messages, local, samples):
        """Returns sums over all machines, and the new local states and messages of one device's machines."""
        method, w, message_sum, step_size, round_number, sizes, active, key = replicated_values
        common = Common(w, message_sum, step_size, round_number, unravel, data.num_samples)
        active_sizes = jnp.where(active, sizes, 0)
        total = jnp.maximum(jnp.sum(active_sizes, dtype=active_sizes.dtype), 1)
        # In float32 at least, because half precision cannot hold large sizes.
        wide_dtype = max(w.dtype, jnp.dtype(jnp.float32), key=lambda dtype: dtype.itemsize)
        weights = (active_sizes.astype(wide_dtype) / total.astype(wide_dtype)).astype(w.dtype)
        round_key = jax.random.fold_in(key, round_number)

        def work_on_machine(message, local, samples, index):
            machine = Machine(message, local, samples, sizes[index], weights[index])
            update, local, new_message = method.work(common, machine, jax.random.fold_in(round_key, index))
            update = jnp.where(machine.active, machine.weight * update, 0)
            return update, local, jnp.where(machine.active, new_message, message)

        indices = _machine_indices(method, messages.shape[0])
        updates, local, messages = jax.vmap(work_on_machine)(messages, local, samples, indices)
        sums = jnp.concatenate([jnp.sum(updates, axis=0), jnp.sum(messages, axis=0)])
        return _sum_over_devices(method, sums), local, messages

    # Arguments, because a function over explicit mesh axes may not close over arrays.
    replicated_values = method, w, state.message_sum, state.step_size, state.round, data.sizes, active, key
    machines = PartitionSpec(_axis(method))
    sums, local, messages = _map_over_mesh(
        method, work_on_device, (PartitionSpec(), machines, machines, machines), (PartitionSpec(), machines, machines)
    )(replicated_values, state.messages, state.local, data.samples)
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
            # Another key than those of machines, into which their indices, 0 to num_machines - 1, are folded.
            mask_key = jax.random.fold_in(jax.random.fold_in(key, current_state.round), method.num_machines)
            active = stragglers.sample(mask_key, method.num_machines)
        return advance(method, current_state, key, active)

    return jax.lax.fori_loop(0, count, advance_once, state.without_data())


@jax.jit
def objective(method: Any, params: PyTree[Array], data: Shards) -> Float[Array, ""]:
    """Computes the mean loss of all samples plus the ridge's term."""
    w, _ = ravel_pytree(params)

    def sum_losses(method, params, samples, sizes):
        losses = jax.vmap(jax.vmap(lambda sample: method.loss(params, sample)))(samples)
        is_sample = sample_mask(losses.shape[1], sizes[_machine_indices(method, losses.shape[0])])
        return _sum_over_devices(method, jnp.sum(jnp.where(is_sample, losses, 0)))

    specs = PartitionSpec(), PartitionSpec(), PartitionSpec(_axis(method)), PartitionSpec()
    losses = _map_over_mesh(method, sum_losses, specs, PartitionSpec())(method, params, data.samples, data.sizes)
    return losses / data.num_samples + method.ridge / 2 * jnp.vdot(w, w)


def spread(method: Any, state: State) -> State:
    """Puts samples, local states and messages of machines on the devices of the method's mesh, if it has one."""
    mesh = method.mesh
    if mesh is None:
        return state

    def sharding(path, _):
        is_per_machine = path[0].name in ("messages", "local") or [key.name for key in path[:2]] == ["data", "samples"]
        return NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]) if is_per_machine else PartitionSpec())

    return jax.device_put(state, jax.tree.map_with_path(sharding, state))


def cast(method: Any, dtype: Any) -> Any:
    """Converts a method's numbers to the dtype of the parameters, so that wider ones do not widen those."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), method)


def transfer(tree: PyTree[Any], mesh: Mesh | None = None) -> PyTree[Array]:
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


def _map_over_mesh(method, function, in_specs, out_specs):
    """Maps a function over the devices of the method's mesh and their machines; without a mesh, returns it as it is."""
    if method.mesh is None:
        return function
    # check_vma would sum gradients with respect to replicated values over devices.
    return jax.shard_map(function, mesh=method.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _sum_over_devices(method, sums):
    return sums if method.mesh is None else jax.lax.psum(sums, _axis(method))


def _machine_indices(method, count):
    """Returns the indices of this device's machines."""
    indices = jnp.arange(count, dtype=jnp.int32)
    return indices if method.mesh is None else jax.lax.axis_index(_axis(method)) * count + indices
