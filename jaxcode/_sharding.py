"""Functions that leave to the compiler where data lie, for arguments whose shardings are part of their types."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def with_auto_axes(
    function: Callable[..., Any], *arguments: PyTree[Any], specs: Callable[[PyTree[PartitionSpec]], Any]
) -> Any:
    """Calls a function with the explicit axes of the mesh made automatic, and shards its results explicitly.

    Permuting and reshaping a batch, and matrix products of it, would have to name a sharding for every step along an
    explicit axis. Where no axis is explicit the function is called as it is.

    Args:
        function: Of the arguments.
        arguments: Pytrees of arrays; the first is the batch.
        specs: From the batch's specs to those of the results, a prefix of their tree.
    """
    mesh = _mesh_of(arguments)
    explicit = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind in _EXPLICIT)
    if not explicit:
        return function(*arguments)

    def spec_of(leaf):
        sharding = jax.typeof(leaf).sharding
        return sharding.spec if sharding.mesh.axis_names else PartitionSpec()

    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs(jax.tree.map(spec_of, arguments[0])), is_leaf=_is_spec
    )
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=shardings)(*arguments)


_EXPLICIT = (AxisType.Explicit,)


def _is_spec(node):
    return isinstance(node, PartitionSpec)


def _mesh_of(arguments) -> AbstractMesh:
    """Returns the mesh that is set, or else the one that the first sharded argument lies on; an empty one if none."""
    mesh = jax.sharding.get_abstract_mesh()
    for leaf in jax.tree.leaves(arguments):
        if not mesh.empty:
            break
        mesh = jax.typeof(leaf).sharding.mesh
    return mesh
