"""Multiplying data by a code's matrix: every leaf of a pytree, in its own dtype, without losing digits."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

from .._checks import is_concrete

Rows = Inexact[Array, "rows features"]


def map_leaves(name: str, function: Callable[[Rows], Rows], tree: PyTree[Array], leading: int) -> PyTree[Array]:
    """Applies a function of rows to every leaf, its trailing axes flattened for the while; integers become float32.

    Raises:
        ValueError: If a leaf's leading axis is not `leading`, or its dtype is not real.
    """

    def on_leaf(path, leaf):
        leaf = jnp.asarray(leaf)
        where = name + jax.tree_util.keystr(path)
        if leaf.ndim < 1 or leaf.shape[0] != leading:
            raise ValueError(f"{where} has shape {leaf.shape}; expected a leading axis of {leading}")
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            leaf = leaf.astype(jnp.float32)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{where} has dtype {leaf.dtype}; expected real numbers, which can be mixed")
        out = function(leaf.reshape(leading, -1))
        return out.reshape(-1, *leaf.shape[1:])

    return jax.tree_util.tree_map_with_path(on_leaf, tree)


def apply_matrix(
    matrix: Float[Array, "out rows"], rows: Rows, returned: Bool[Array, "rows"] | None = None
) -> Inexact[Array, "out features"]:
    r"""The product of a float64 matrix with rows of data, in the data's dtype.

    Where nodes are far closer to each other than others, a matrix has large entries of both signs, and in float32 their
    products cancel to leave few digits. There the product is summed by parts,

    .. math::
        \sum_i m_i y_i = y_r + \sum_i \Big(\sum_{j \ge i} m_j - [i \le r]\Big) (y_i - y_{i-1}), \qquad y_0 = 0,

    over the rows that returned, for any of them as r: the differences of close neighbours are exact, and one large
    sum multiplies them. Elsewhere the plain product is the better one. `tests/benchmarks/accuracy.py` prints what is
    left of the digits.

    Args:
        matrix: Shape (p, n), float64; its columns are zero where rows did not return.
        rows: Shape (n, d). Narrower than float32, they are summed in float32.
        returned: Which rows to read; all if not given.

    Returns:
        Shape (p, d).
    """
    with jax.enable_x64(True):
        dtype = rows.dtype
        if returned is not None:
            rows = jnp.where(returned[:, None], rows, jnp.zeros((), dtype))
        if dtype == jnp.float64:
            return _product(matrix, rows)
        single = jnp.asarray(matrix, jnp.float32)
        if dtype != jnp.float32:
            return _product(single, rows).astype(dtype)

        by_parts = _by_parts(matrix, returned)
        plain_size, parts_size = _size(matrix), _size(by_parts.matrix)
        # Up to a factor of 32 the plain product loses little. Beyond it the sum by parts is better, unless its
        # entries are far larger: then it would take slowly changing sums of rows apart, which the plain product does
        # well.
        is_better = (plain_size > 32) & (parts_size < 16 * plain_size)

        def sum_by_parts(rows):
            return _origins(by_parts, rows) + _product(by_parts.matrix.astype(jnp.float32), _steps(by_parts, rows))

        def plainly(rows):
            return _product(single, rows)

        if is_concrete(is_better):
            return sum_by_parts(rows) if is_better else plainly(rows)
        return jax.lax.cond(is_better, sum_by_parts, plainly, rows)


class _ByParts(NamedTuple):
    """A matrix for differences of rows instead of rows.

    Attributes:
        matrix: Sums of the entries from each row on, less one up to the origin, float64.
        live: Which rows are read.
        before: The row that each is taken the difference from; -1 for none.
        origin: The row that each sum starts from; -1 for none.
    """

    matrix: Float[Array, "out rows"]
    live: Bool[Array, "rows"]
    before: Int[Array, "rows"]
    origin: Int[Array, "out"]


def _by_parts(matrix, returned) -> _ByParts:
    num_rows = matrix.shape[1]
    index = jnp.arange(num_rows, dtype=jnp.int32)
    live = jnp.ones(num_rows, bool) if returned is None else returned
    latest = jax.lax.cummax(jnp.where(live, index, -1))
    before = jnp.concatenate([jnp.full(1, -1, jnp.int32), latest[:-1]])
    tails = jnp.cumsum(matrix[:, ::-1], axis=1)[:, ::-1]
    # A sum starts from the row where its tail falls to a half, next to the point it is for: rows far off, whose
    # differences would add up to nothing but rounding, then have no part in it.
    origin = latest[jnp.maximum(jnp.sum(tails > 0.5, axis=1, dtype=jnp.int32) - 1, 0)]
    from_origin = jnp.where(live, tails - (index <= origin[:, None]), 0)
    return _ByParts(from_origin, live, before, origin)


def _size(matrix):
    """The largest sum of magnitudes in a row: how much errors of the data may grow."""
    return jnp.max(jnp.sum(jnp.abs(matrix), axis=1))


def _steps(by_parts, rows):
    before = jnp.where((by_parts.before >= 0)[:, None], rows[jnp.maximum(by_parts.before, 0)], 0)
    return jnp.where(by_parts.live[:, None], rows - before, 0)


def _origins(by_parts, rows):
    return jnp.where((by_parts.origin >= 0)[:, None], rows[jnp.maximum(by_parts.origin, 0)], 0)


def _product(matrix, rows):
    wide = jnp.float64 if rows.dtype == jnp.float64 else jnp.float32
    return jax.lax.dot_general(
        matrix,
        rows,
        (((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=wide,
    )
