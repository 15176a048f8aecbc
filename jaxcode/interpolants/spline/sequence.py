"""Knots and points in one ascending sequence, and its cuts into blocks. Indices only: nothing to differentiate."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..._pytree import pytree
from ..abstract import SAME_SITE

Indices = Int[np.ndarray | Array, "..."]


@pytree("block", "rows", "points", "distinct", eq=False)
class Sequence:
    """How n knots and p points interleave, and what of them lies in each block of the sequence.

    An entry is a knot or a point. Knots at one place form a site, which is entered where its last knot stands.

    Attributes:
        order: Entry to index into points followed by knots, shape (n + p,).
        entry: Index into points followed by knots to entry, shape (p + n,).
        closing: Knot to the last knot at its place, shape (n,).
        knots_before: Block to the number of knots before it, shape (blocks,).
        block: Entries in a block; the last block is filled up with empty ones. Static.
        rows: At most so many knots lie in a block, whose data it reads. Static.
        points: At most so many points lie in a block. Static.
        distinct: Whether it is known that no two knots share a place. Static.
    """

    order: Indices
    entry: Indices
    closing: Indices
    knots_before: Indices
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

    @property
    def first_row(self) -> Indices:
        """Block to the first row of data that it reads: its own knots are among the rows from there on."""
        return _xp(self.knots_before).minimum(self.knots_before, self.closing.shape[0] - self.rows)

    @property
    def first_point(self) -> Indices:
        """Block to the first of the results that it adds to: its own points are among those from there on."""
        start = np.arange(0, self.length, self.block, dtype=np.int32)
        return _xp(self.knots_before).minimum(start - self.knots_before, self.num_points - self.points)


def arrange(
    knots: Float[np.ndarray | Array, "knots"], points: Float[np.ndarray | Array, "points"], block: int | None = None
) -> Sequence:
    """Interleaves ascending knots with ascending points and cuts the sequence into blocks.

    With NumPy arrays everything is NumPy and the blocks are as small as can be; traced arrays, whose order is not known
    yet, have blocks that do for any order.

    Args:
        knots: Ascending; neighbours may be equal.
        points: Ascending.
        block: Entries in a block; all in one if not given.
    """
    known = isinstance(knots, np.ndarray) and isinstance(points, np.ndarray)
    xp = np if known else jnp
    n, p = knots.shape[0], points.shape[0]
    size = min(block or n + p, n + p)
    same = SAME_SITE * (knots[-1] - knots[0])
    site = xp.cumsum(xp.concatenate([xp.zeros(1, np.int32), xp.diff(knots) > same]), dtype=np.int32)
    closing = xp.searchsorted(site, site, side="right").astype(np.int32) - 1
    # Points stand before knots at the same place, which makes no difference to the curve.
    order = xp.argsort(xp.concatenate([points, knots]), stable=True).astype(np.int32)
    entry = xp.argsort(order).astype(np.int32)
    start = np.arange(0, n + p, size, dtype=np.int32)
    knots_before = xp.searchsorted(entry[p:], start).astype(np.int32)

    rows, places, distinct = min(size, n), min(size, p), False
    if known:
        rows = int(np.diff(knots_before, append=n).max())
        places = int(np.diff(start - knots_before, append=p).max())
        distinct = bool((closing == np.arange(n)).all())
    return Sequence(order, entry, closing, knots_before, size, rows, places, distinct)


def _xp(array):
    return np if isinstance(array, np.ndarray) else jnp
