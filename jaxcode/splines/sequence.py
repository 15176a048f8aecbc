"""Knots and points in one ascending sequence, and its cuts into blocks. Indices only: nothing to differentiate."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._pytree import pytree

# Knots closer than this share of their span are one knot and their values are averaged. A curve through two values
# 1e-12 apart has slopes of 1e12, which no data justify; nodes one float32 step apart are 1e5 times farther.
SAME_PLACE = 1e-12

Indices = Int[np.ndarray | Array, "..."]


@pytree("block", "rows", "points", "distinct", eq=False)
class Sequence:
    """How n knots and p points interleave, and where blocks of the sequence find their data and leave their results.

    An entry is a knot or a point. Knots at one place form a site, which is entered where its last knot stands.

    Attributes:
        order: Entry to index into points followed by knots, shape (n + p,).
        entry: Index into points followed by knots to entry, shape (p + n,).
        closing: Knot to the last knot at its place, shape (n,).
        first_row: Block to the first row of data that it reads, shape (blocks,).
        first_point: Block to the first of the points that it holds, shape (blocks,).
        block: Entries in a block; the last block is filled up with empty ones. Static.
        rows: How many rows of data every block reads. Static.
        points: How many points every block may hold. Static.
        distinct: Whether it is known that no two knots share a place. Static.
    """

    order: Indices
    entry: Indices
    closing: Indices
    first_row: Indices
    first_point: Indices
    block: int
    rows: int
    points: int
    distinct: bool

    @property
    def num_points(self) -> int:
        """P."""
        return self.order.shape[0] - self.closing.shape[0]

    @property
    def length(self) -> int:
        """Entries with those that fill the last block up."""
        return -(-self.order.shape[0] // self.block) * self.block


def arrange(
    knots: Float[np.ndarray | Array, "knots"], points: Float[np.ndarray | Array, "points"], block: int | None = None
) -> Sequence:
    """Interleaves ascending knots with ascending points and cuts the sequence into blocks.

    With NumPy arrays everything is NumPy and the blocks read no more rows than they need; with traced arrays, whose
    order is not known yet, they read enough for any order.

    Args:
        knots: Ascending; neighbours may be equal.
        points: Ascending.
        block: Entries in a block; all in one if not given.
    """
    known = isinstance(knots, np.ndarray) and isinstance(points, np.ndarray)
    xp = np if known else jnp
    n, p = knots.shape[0], points.shape[0]
    same = SAME_PLACE * (knots[-1] - knots[0])
    site = xp.cumsum(xp.concatenate([xp.zeros(1, np.int32), xp.diff(knots) > same]), dtype=np.int32)
    closing = xp.searchsorted(site, site, side="right").astype(np.int32) - 1
    # Points stand before knots at the same place, which makes no difference to the curve.
    order = xp.argsort(xp.concatenate([points, knots]), stable=True).astype(np.int32)
    entry = xp.argsort(order).astype(np.int32)

    distinct = known and bool((closing == np.arange(n)).all())
    if block is None or block >= n + p:
        start = np.zeros(1, np.int32)
        return Sequence(order, entry, closing, start, start, n + p, n, p, distinct)
    cut = _cut(xp, site, closing, order - p, block, n, p)
    return Sequence(order, entry, closing, cut.first_row, cut.first_point, block, cut.rows, cut.points, distinct)


class _Cut(NamedTuple):
    first_row: Indices
    first_point: Indices
    rows: int
    points: int


def _cut(xp, site, closing, knot, block, n, p):
    """Where every block begins, and how many rows and points it must hold; knot is below 0 for points."""
    blocks = -(-(n + p) // block)
    filler = blocks * block - (n + p)
    # A site's data are read where the site is entered, though its first knots may stand in the block before.
    opening = xp.searchsorted(site, site, side="left").astype(np.int32)
    none_row, none_point = xp.full(filler, n, np.int32), xp.full(filler, p, np.int32)
    is_point = knot < 0
    closes = ~is_point & (closing[xp.maximum(knot, 0)] == knot)
    opens = xp.where(closes, opening[xp.maximum(knot, 0)], n)
    count = xp.cumsum(is_point, dtype=np.int32) - 1
    first_row = xp.concatenate([opens, none_row]).reshape(blocks, block).min(axis=1)
    first_point = xp.concatenate([xp.where(is_point, count, p), none_point]).reshape(blocks, block).min(axis=1)
    if xp is np:
        last_row = np.concatenate([np.where(closes, knot, -1), np.full(filler, -1)]).reshape(blocks, block).max(axis=1)
        rows = int(np.max(last_row - first_row)) + 1
        held = np.concatenate([is_point, np.zeros(filler, bool)]).reshape(blocks, block).sum(axis=1)
        points = int(held.max())
    else:
        # Twice the block, for sites whose first knots stand in the block before.
        rows, points = min(2 * block, n), min(block, p)
    first_row, first_point = xp.minimum(first_row, n - rows), xp.minimum(first_point, p - points)
    return _Cut(first_row.astype(np.int32), first_point.astype(np.int32), rows, points)
