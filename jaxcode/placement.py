"""Places workers on devices inside one compiled program.

Stragglers are only a mask in such a program, which returns when its slowest device does. To decode before the slowest
worker answers, see `jaxcode.pools`.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .functions import PureFunction, check_answers
from .pipeline import flatten_groups, unflatten_groups

__all__ = ["AbstractPlacement", "pmap", "shard_map", "vmap"]

# Answers of at least this many numbers are decoded in parts, one on each device. Narrower ones are too little work to
# exchange between devices; where the limit is best was not measured.
_WIDE = 1024
_NO_MESH = AbstractMesh((), ())


class AbstractPlacement(abc.ABC):
    """Places the batch on devices and computes the workers' answers there. Hashable: a static argument of `jit`.

    Attributes:
        is_distributed: Whether data lie on several devices, so that products of some of their features would move them.
    """

    is_distributed: bool

    @abc.abstractmethod
    def place(self, x: PyTree[Array]) -> PyTree[Array]:
        """Places the batch, leaves (B, ...), on the devices where it is permuted and encoded."""

    @abc.abstractmethod
    def answer(self, fn: PureFunction, params: PyTree[Any], coded: PyTree[Array]) -> PyTree[Array]:
        """Computes every worker's answers.

        Args:
            fn: The model, of params and a batch.
            params: Its parameters.
            coded: Coded inputs, leaves (N, groups, ...).

        Returns:
            Answers, leaves (N, groups, ...).

        Raises:
            ValueError: If the model's results do not have its batch as leading axis.
        """


def vmap() -> AbstractPlacement:
    """Computes all workers as one batch on the device that runs the program."""
    return _Vmap()


def shard_map(mesh: Mesh, axis: str | Sequence[str] = "workers") -> AbstractPlacement:
    """Spreads workers over the devices of a mesh.

    Any number of workers runs on any number of devices: each device has equally many, padded with copies of another
    worker. While it is permuted and encoded, the batch is spread over the devices by its features, where one of its
    axes can be divided, so that each number is sent once: as part of a coded input, to the device that computes it.
    Wide answers are decoded in the same way and the results stay spread. Parameters may be placed in any way: those
    that are spread over other axes of the mesh stay so, others are gathered.

    Args:
        mesh: A mesh of any devices, also of several hosts.
        axis: The axis, or axes, over which workers are spread.

    Raises:
        ValueError: If the mesh has no such axis, or no axis is given.

    >>> mesh = jax.make_mesh((len(jax.devices()),), ("workers",))
    >>> double = lambda _, batch: 2 * batch
    >>> jax.jit(lambda coded: shard_map(mesh).answer(double, (), coded))(jnp.arange(3.0)[:, None]).ravel().tolist()
    [0.0, 2.0, 4.0]
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    if not axes or any(name not in mesh.axis_names for name in axes):
        raise ValueError(f"axis is {axis!r}, but the mesh's axes are {mesh.axis_names}; expected some of them")
    # The compiler places all data that are not constrained explicitly below.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return _ShardMap(mesh, axes)


def pmap(devices: Sequence[Any] | None = None) -> AbstractPlacement:
    """Spreads workers over devices by `jax.pmap`, the older form of `shard_map`, with the same results.

    Where devices have unequal numbers of workers, f is computed on coded inputs of ones too, which are dropped.

    Args:
        devices: Devices of this process; all that it has if not given.

    Raises:
        ValueError: On use inside a mesh of another number of devices.
    """
    return _Pmap(None if devices is None else tuple(devices))


@final
@dataclasses.dataclass(frozen=True)
class _Vmap(AbstractPlacement):
    is_distributed = False

    def place(self, x):
        return x

    def answer(self, fn, params, coded):
        return _answer_groups(fn, params, coded)


@final
@dataclasses.dataclass(frozen=True)
class _ShardMap(AbstractPlacement):
    mesh: Mesh
    axes: tuple[str, ...]
    is_distributed = True

    def place(self, x):
        return jax.tree.map(lambda leaf: self._spread_features(leaf, 1), x)

    def answer(self, fn, params, coded):
        num_devices = self._num_devices()
        num_workers = jax.tree.leaves(coded)[0].shape[0]
        shard_size = -(-num_workers // num_devices)
        spec = PartitionSpec(self.axes)

        def compute(params, shard):
            if num_workers % num_devices:
                # Beyond the last worker, compute a copy of a worker on this device: padding might not be in f's domain.
                worker = jax.lax.axis_index(self.axes) * shard_size + np.arange(shard_size, dtype=np.int32)
                row = jnp.maximum(jnp.minimum(worker, num_workers - 1) - worker[0], 0)
                shard = jax.tree.map(lambda leaf: leaf[row], shard)
            return _answer_groups(fn, params, shard)

        compute_shards = jax.shard_map(
            compute,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), spec),
            out_specs=spec,
            axis_names=set(self.axes),
            check_vma=False,
        )
        inputs = jax.lax.with_sharding_constraint(_pad_workers(coded, num_devices), NamedSharding(self.mesh, spec))
        answers = jax.tree.map(lambda leaf: leaf[:num_workers], compute_shards(params, inputs))
        return jax.tree.map(
            lambda leaf: self._spread_features(leaf, 2) if math.prod(leaf.shape[2:]) >= _WIDE else leaf, answers
        )

    def _spread_features(self, leaf, first_axis):
        """Spreads a leaf over the devices by the first of its feature axes that can be divided."""
        num_devices = self._num_devices()
        for axis, size in enumerate(leaf.shape):
            if axis >= first_axis and size > 1 and size % num_devices == 0:
                spec = PartitionSpec(*[None] * axis, self.axes)
                return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))
        return leaf

    def _num_devices(self):
        return math.prod(self.mesh.shape[name] for name in self.axes)


@final
@dataclasses.dataclass(frozen=True)
class _Pmap(AbstractPlacement):
    devices: tuple[Any, ...] | None
    is_distributed = True

    def place(self, x):
        return x

    def answer(self, fn, params, coded):
        devices = jax.local_devices() if self.devices is None else list(self.devices)
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.size != len(devices):
            raise ValueError(
                f"placement is pmap over {len(devices)} devices inside a mesh of {mesh.size} devices; expected all "
                "devices of the mesh, or no mesh: leave out devices, or use shard_map(mesh)"
            )
        compute_shards = jax.pmap(
            lambda params, shard: _answer_groups(fn, params, shard), in_axes=(None, 0), devices=devices
        )
        num_workers = jax.tree.leaves(coded)[0].shape[0]
        shards = jax.tree.map(
            lambda leaf: leaf.reshape(len(devices), -1, *leaf.shape[1:]), _pad_workers(coded, len(devices))
        )
        # pmap sets a mesh of its own, which must not conflict with the caller's.
        with jax.sharding.use_abstract_mesh(_NO_MESH):
            answers = compute_shards(params, shards)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_workers], answers)


def _answer_groups(fn, params, coded):
    """Computes a model on leaves (workers, groups, ...) as one batch."""
    num_workers, num_groups = jax.tree.leaves(coded)[0].shape[:2]
    answers = fn(params, flatten_groups(coded))
    check_answers(answers, num_workers * num_groups, allow_integers=True)
    return unflatten_groups(answers, num_workers)


def _pad_workers(coded, num_devices):
    """Pads leaves (N, ...) with ones to a multiple of the devices."""

    def pad_leaf(leaf):
        num_rows = -leaf.shape[0] % num_devices
        return jnp.pad(leaf, [(0, num_rows)] + [(0, 0)] * (leaf.ndim - 1), constant_values=1) if num_rows else leaf

    return jax.tree.map(pad_leaf, coded)
