"""Applies operators to data of any width and dtype: masks absent rows and repeats products that lost digits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from .._float64 import double_precision
from .._side_input import SideInput, is_side_input
from .abstract import AbstractLinop, Results, Rows, allow_transfers, apply_in_one_pass, has_numpy_leaves
from .double_single import as_arguments
from .gather import Gather

# Rounding errors of float32 products grow with the sum of magnitudes in a row of the matrix. Where that exceeds this
# bound the product is computed again in float64: up to it at most four binary digits are lost, and a lower bound would
# repeat more products.
_MAX_AMPLIFICATION = 16.0
# Masking absent rows copies the data, whose cost is negligible up to this many numbers. More are multiplied unmasked,
# and checked.
_MAX_SIZE_TO_MASK = 2**20
# How many numbers one pass of a repeated product reads: fewer need less memory, more make fewer steps.
_NUMBERS_PER_PASS = 2**18


def apply(linop: AbstractLinop, rows: Rows, *, float64_fallback: bool = True) -> Results:
    """Computes the results in the data's dtype.

    Wide data are multiplied once, unmasked. Where an absent row holds NaN or infinities, or results are undefined, the
    product is repeated with absent rows masked, a few features at a time.

    Args:
        linop: The operator.
        rows: The data, shape (n, features), real; of any dtype where the operator only moves rows. Float32 stays
            float32, narrower data are multiplied in their own dtype and accumulated in float32.
        float64_fallback: Whether float32 products are computed again in float64 where they lose digits by cancellation:
            those of operators with large entries of both signs.

    Returns:
        Shape (p, features). Undefined results are `undefined_value`, which is NaN for floating dtypes.
    """
    if not linop.mixes:
        with allow_transfers():
            return apply_compiled(linop, rows)
    float64_fallback = float64_fallback and rows.dtype == jnp.float32
    if float64_fallback and has_numpy_leaves(linop):
        float64_fallback = bool(linop.amplification() > _MAX_AMPLIFICATION)
    linop = as_arguments(linop)
    is_complete = linop.present is None and linop.defined is None
    with allow_transfers():
        if not rows.size or (not float64_fallback and (rows.size <= _MAX_SIZE_TO_MASK or is_complete)):
            return apply_compiled(linop, rows)
        return _apply_and_check_compiled(float64_fallback, linop, rows)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _apply_and_check(float64_fallback, linop, rows):
    if rows.size <= _MAX_SIZE_TO_MASK:
        results = apply_in_one_pass(linop, rows)
    else:
        results, is_right = linop.unmasked_product(rows)
        if linop.defined is not None:
            is_right = is_right & jnp.all(linop.defined)
        results = results.astype(rows.dtype)
        if is_right is not True:
            results = _repeat_unless(is_right, functools.partial(apply_in_one_pass, linop), rows, results)
    if float64_fallback:
        is_exact_enough = linop.amplification() <= _MAX_AMPLIFICATION
        results = _repeat_unless(is_exact_enough, functools.partial(_apply_in_double, linop), rows, results)
    return results


def _apply_in_double(linop, rows):
    with double_precision():
        return apply_in_one_pass(linop, rows.astype(jnp.float64)).astype(rows.dtype)


def _repeat_unless(is_accepted, product, rows, results):
    """Computes results again unless they are accepted, in passes over few features, which take little memory."""
    features = rows.shape[-1]
    # Narrow data take a single pass, because XLA on CPUs widens all of them to read a part.
    is_narrow = jnp.finfo(rows.dtype).bits < 32
    width = features if is_narrow else min(-(-_NUMBERS_PER_PASS * features // rows.size), features)
    passes = -(-features // width)

    def compute(i, results):
        start = jnp.minimum(i * width, features - width)
        # The barrier makes the block depend on i: XLA would move a single, independent pass out of the loop, where it
        # would always be computed.
        block, _ = jax.lax.optimization_barrier((jax.lax.dynamic_slice_in_dim(rows, start, width, axis=-1), i))
        return jax.lax.dynamic_update_slice_in_dim(results, product(block), start, axis=-1)

    return jax.lax.fori_loop(0, jnp.where(is_accepted, 0, passes), compute, results)


@_apply_and_check.defjvp
def _apply_and_check_jvp(float64_fallback, primals, tangents):
    return _apply_and_check(float64_fallback, *primals), jax.jvp(apply_in_one_pass, primals, tangents)[1]


# Compiled, because outside of jit loops would be compiled at every call.
apply_compiled = jax.jit(apply_in_one_pass, inline=True)
_apply_and_check_compiled = jax.jit(_apply_and_check, inline=True, static_argnums=0)


def apply_to_tree(
    name: str,
    linop: AbstractLinop,
    tree: PyTree[ArrayLike],
    num_rows: int,
    *,
    float64_fallback: bool = True,
    one_pass: bool = False,
) -> PyTree[Array]:
    """Applies an operator to every leaf of shape (n, ...), whose trailing axes are flattened for the product.

    Args:
        name: Name of the tree, for errors.
        linop: The operator.
        tree: Leaves (n, ...). Unsigned bytes become float32 where the operator mixes rows. Of a `SideInput` nothing is
            mixed: each of its rows is the one with the largest weight.
        num_rows: n.
        float64_fallback: As for `apply`.
        one_pass: Whether to compute one masked product, without the passes of `apply`; for data sharded over devices.

    Returns:
        Leaves (p, ...).

    Raises:
        ValueError: If a leaf's leading axis is not n, or its dtype cannot be mixed.
    """

    def apply_to_leaf(path, leaf):
        leaf_name = name + jax.tree_util.keystr(path)
        leaf = as_mixable(leaf_name, leaf) if linop.mixes else jnp.asarray(leaf)
        if leaf.ndim < 1 or leaf.shape[0] != num_rows:
            raise ValueError(f"{leaf_name} has shape {leaf.shape}; expected a leading axis of {num_rows}")
        if one_pass and leaf.ndim > 1:
            return _apply_along_axes(linop, leaf)
        rows = leaf.reshape(num_rows, math.prod(leaf.shape[1:]))
        results = apply(linop, rows, float64_fallback=float64_fallback)
        return results.reshape(results.shape[0], *leaf.shape[1:])

    if not linop.mixes:
        return jax.tree_util.tree_map_with_path(apply_to_leaf, tree)

    def apply_to_node(path, node):
        if not is_side_input(node):
            return apply_to_leaf(path, node)
        heaviest = Gather(jnp.argmax(jnp.abs(linop.matrix()), axis=1).astype(jnp.int32), num_rows)
        return SideInput(apply_to_tree(name + jax.tree_util.keystr(path), heaviest, node.values, num_rows))

    return jax.tree_util.tree_map_with_path(apply_to_node, tree, is_leaf=is_side_input)


def _apply_along_axes(linop, leaf):
    """Applies an operator without flattening the trailing axes: data sharded along one of them would be gathered."""
    product = functools.partial(apply_compiled, linop)
    for _ in range(leaf.ndim - 2):
        product = jax.vmap(product, in_axes=-1, out_axes=-1)
    return product(leaf)


def is_mixable(leaf: Array | np.ndarray) -> bool:
    """Returns whether a leaf holds real numbers, or unsigned bytes, which are images: these can be mixed."""
    return leaf.dtype == jnp.uint8 or jnp.issubdtype(leaf.dtype, jnp.floating)


def as_mixable(name: str, leaf: Array | np.ndarray) -> Array:
    """Converts a leaf to real numbers that can be mixed: unsigned bytes, which are images, become float32.

    Raises:
        ValueError: If it holds other integers, which may be tokens or classes, or no real numbers.
    """
    leaf = jnp.asarray(leaf)
    if leaf.dtype == jnp.uint8:
        return leaf.astype(jnp.float32)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        raise ValueError(
            f"{name} has dtype {leaf.dtype}; expected real numbers, because this code mixes inputs and a mixture of "
            "tokens or classes means nothing: code the embeddings (let f begin behind its embedding layer), use a code "
            "that mixes nothing such as ReplicationCode, mark what is not to be mixed as jaxcode.SideInput, or convert "
            "numbers that may be mixed with .astype('float32')"
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"{name} has dtype {leaf.dtype}; expected real numbers, which can be mixed: mark what is not to be mixed, "
            "such as a mask, as jaxcode.SideInput"
        )
    return leaf
