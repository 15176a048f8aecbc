"""Makes explicit mesh axes automatic and replicates arrays: explicit sharding is part of an array's type."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .checks import static_value


def call_with_auto_axes(
    function: Callable[..., Any],
    *arguments: PyTree[Any],
    specs: Callable[[PyTree[PartitionSpec]], Any],
    **context: PyTree[Any],
) -> Any:
    """Calls a function with the explicit axes of the mesh made automatic, and shards its results explicitly.

    Permuting and reshaping a batch, and matrix products of it, would have to name a sharding for every step along an
    explicit axis. Where no axis is explicit the function is called as it is.

    Args:
        function: A function of the arguments and the context.
        arguments: Pytrees of arrays; the first is the batch.
        specs: From the partition specs of the batch to those of the results, a prefix of the results' tree.
        context: Pytrees whose static leaves stay static.

    Returns:
        The function's results.
    """
    mesh = _mesh_of((arguments, context))
    explicit = tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    )
    if not explicit:
        return function(*arguments, **context)

    def spec_of(leaf):
        sharding = jax.typeof(leaf).sharding
        return sharding.spec if sharding.mesh.axis_names else PartitionSpec()

    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs(jax.tree.map(spec_of, arguments[0])), is_leaf=_is_spec
    )
    leaves, structure = jax.tree.flatten(context)
    is_traced = [static_value(leaf) is None for leaf in leaves]

    def call(traced, *arguments):
        traced = iter(traced)
        merged = [next(traced) if flag else leaf for flag, leaf in zip(is_traced, leaves, strict=True)]
        return function(*arguments, **jax.tree.unflatten(structure, merged))

    traced = [leaf for flag, leaf in zip(is_traced, leaves, strict=True) if flag]
    return jax.sharding.auto_axes(call, axes=explicit, out_sharding=shardings)(traced, *arguments)


def replicate(tree: PyTree[Array], num_sharded: int = 0) -> PyTree[Array]:
    """Replicates arrays along their explicitly sharded axes.

    Indexing and reshaping along such an axis raise `ShardingTypeError`. Axes of a mesh that are automatic or manual
    are left unchanged.

    Args:
        tree: Arrays.
        num_sharded: How many leading axes of the arrays stay sharded.

    Returns:
        The same arrays, resharded.
    """

    def replicate_leaf(leaf):
        sharding = jax.typeof(leaf).sharding
        if all(axes is None for axes in sharding.spec[num_sharded:]):
            return leaf
        return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:num_sharded])))

    return jax.tree.map(replicate_leaf, tree)


def shard_like(x: Array, other: Array) -> Array:
    """Shards an array as another of its shape is along explicit axes."""
    sharding = jax.typeof(other).sharding
    return x if all(axes is None for axes in sharding.spec) else jax.sharding.reshard(x, sharding)


def _is_spec(node):
    return isinstance(node, PartitionSpec)


def _mesh_of(arguments) -> AbstractMesh:
    """Returns the mesh that is set, or else the one that the first sharded argument lies on; an empty one if none."""
    mesh = jax.sharding.get_abstract_mesh()
    for leaf in jax.tree.leaves(arguments):
        if not mesh.empty:
            break
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
    return mesh
