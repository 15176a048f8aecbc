"""Workers inside one compiled program: on which devices they compute.

Stragglers are a mask here: such a program returns when its slowest device does. For answers from whoever is early, see
`ThreadPool` and `RayPool`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from ..functions import PureFunction

# Of answers with so many numbers each, devices hold a part of every answer; narrower ones are not worth the while.
_WIDE = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class WorkerMap:
    """On which devices workers compute; for use inside of `jit`.

    Attributes:
        place: Where the batch lies while it is ordered and encoded; leaves (B, ...) to the same.
        answer: From a model, its parameters, all workers' coded inputs, leaves (groups N, ...) with the groups one
            after the other, and N, to their answers, likewise.
        spread: Whether data lie on several devices; taking them part by part would then send them about.
    """

    place: Callable[[PyTree[Array]], PyTree[Array]]
    answer: Callable[[PureFunction, PyTree[Any], PyTree[Array], int], PyTree[Array]]
    spread: bool


def vmap() -> WorkerMap:
    """All workers on the device that runs the program, as one batch."""
    return WorkerMap(lambda x: x, lambda fn, params, sent, num_workers: fn(params, sent), False)


def shard_map(mesh: Mesh, axis: str | Sequence[str] = "workers") -> WorkerMap:
    """Workers spread over the devices of a mesh.

    Any number of workers runs on any number of devices: each device has as many, the last ones perhaps a copy of
    another worker. While it is ordered and encoded the batch is spread over the devices by its features, where one of
    its axes allows it, so that each number is sent once: as part of a coded input, to the device that computes it. Wide
    answers are decoded likewise and the results stay spread. Parameters may lie as they like: those that are spread
    over other axes of the mesh stay so, others are gathered.

    Args:
        mesh: Of any devices, of several hosts too.
        axis: Over which axis workers are spread, or axes.

    Raises:
        ValueError: If the mesh has no such axis.

    >>> mesh = jax.make_mesh((len(jax.devices()),), ("workers",))
    >>> double = lambda _, batch: 2 * batch
    >>> jax.jit(lambda sent: shard_map(mesh).answer(double, (), sent, 3))(jnp.arange(3.0)).tolist()
    [0.0, 2.0, 4.0]
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    missing = [name for name in axes if name not in mesh.axis_names]
    if missing or not axes:
        raise ValueError(f"axis is {axis!r}, but the mesh's axes are {mesh.axis_names}; expected some of them")
    # Where data lie is left to the compiler, but for what is said here.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    devices = math.prod(mesh.shape[name] for name in axes)
    spread = PartitionSpec(None, axes)

    def by_features(leaf):
        """The leaf (B, ...) with its first axis of features that can be, spread over the devices."""
        at = next((i for i, size in enumerate(leaf.shape) if i > 0 and size > 1 and size % devices == 0), None)
        if at is None:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*[None] * at, axes)))

    def answer(fn, params, sent, num_workers):
        each = -(-num_workers // devices)

        def share(params, batch):
            if num_workers % devices:
                # Beyond the last worker, as one that is here: what is made up might not be in f's domain.
                mine = jax.lax.axis_index(axes) * each + np.arange(each)
                here = jnp.maximum(jnp.minimum(mine, num_workers - 1) - mine[0], 0)
                batch = jax.tree.map(lambda leaf: jnp.take(leaf, here, axis=1), batch)
            return _on_groups(lambda flat: fn(params, flat), batch)

        mapped = jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(PartitionSpec(), spread),
            out_specs=spread,
            axis_names=set(axes),
            check_vma=False,
        )

        def on_workers(batch):
            return mapped(params, jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, spread)))

        answers = _on_padded(on_workers, sent, num_workers, devices)
        return jax.tree.map(lambda leaf: by_features(leaf) if math.prod(leaf.shape[1:]) >= _WIDE else leaf, answers)

    return WorkerMap(lambda x: jax.tree.map(by_features, x), answer, True)


def pmap(devices: Sequence[Any] | None = None) -> WorkerMap:
    """Workers spread over devices by `jax.pmap`, the older form of `shard_map`; the results are the same.

    Args:
        devices: Of this process; all that it has if not given.
    """

    def answer(fn, params, sent, num_workers):
        chosen = jax.local_devices() if devices is None else list(devices)
        mapped = jax.pmap(
            lambda params, batch: _on_groups(lambda flat: fn(params, flat), batch), in_axes=(None, 0), devices=chosen
        )

        def on_workers(batch):
            # Leaves (groups, N, ...) to (devices, groups, N / devices, ...) and back.
            split = jax.tree.map(
                lambda leaf: jnp.moveaxis(leaf.reshape(leaf.shape[0], len(chosen), -1, *leaf.shape[2:]), 1, 0), batch
            )
            return jax.tree.map(
                lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(leaf.shape[1], -1, *leaf.shape[3:]),
                mapped(params, split),
            )

        return _on_padded(on_workers, sent, num_workers, len(chosen))

    return WorkerMap(lambda x: x, answer, True)


def _on_groups(fn, batch):
    """A model of a batch on leaves (groups, workers, ...)."""
    groups, workers = jax.tree.leaves(batch)[0].shape[:2]
    answers = fn(jax.tree.map(lambda leaf: leaf.reshape(groups * workers, *leaf.shape[2:]), batch))
    return jax.tree.map(lambda leaf: leaf.reshape(groups, workers, *leaf.shape[1:]), answers)


def _on_padded(fn, sent, num_workers, devices):
    """A function of leaves (groups, workers, ...) with as many workers on each device, on leaves (groups N, ...)."""
    missing = -num_workers % devices

    def apart(leaf):
        leaf = leaf.reshape(-1, num_workers, *leaf.shape[1:])
        return jnp.pad(leaf, [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2), constant_values=1)

    answers = fn(jax.tree.map(apart, sent))
    return jax.tree.map(lambda leaf: leaf[:, :num_workers].reshape(-1, *leaf.shape[2:]), answers)
