"""The order of knots and points in one ascending sequence, and its blocks; indices only, without derivatives."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..._pytree import pytree
from ..abstract import SAME_SITE

Indices = Int[np.ndarray | Array, "..."]


@pytree("block_size", "rows", "points", "distinct", eq=False)
class Interleaving:
    """Describes how n knots and p points interleave in one sequence of n + p entries, which is divided into blocks.

    Knots at one place form a site. A site is observed at the entry of its last knot, which closes it; until
    then it is open, in one block or several.

    Attributes:
        order: For each entry, its index in points followed by knots, shape (n + p,).
        entry: The inverse: the entry of each point, then of each knot, shape (p + n,).
        closing: For each knot, the last knot of its site, shape (n,).
        knots_before: For each block, the number of knots before it, shape (blocks,).
        block_size: Entries in a block; the last block is padded with empty ones. Static.
        rows: How many rows of data each block reads: the largest number of knots in a block. Static.
        points: The largest number of points in a block. Static.
        distinct: Whether all knots are known to be distinct sites. Static.
    """

    order: Indices
    entry: Indices
    closing: Indices
    knots_before: Indices
    block_size: int
    rows: int
    points: int
    distinct: bool

    @property
    def num_points(self) -> int:
        """p, the number of points."""
        return self.order.shape[0] - self.closing.shape[0]

    @property
    def length(self) -> int:
        """The number of entries, with the padding of the last block."""
        return -(-self.order.shape[0] // self.block_size) * self.block_size

    @property
    def first_row(self) -> Indices:
        """The first of the `rows` rows of data that each block reads, those of its knots among them."""
        return _xp(self.knots_before).minimum(self.knots_before, self.closing.shape[0] - self.rows)

    @property
    def first_point(self) -> Indices:
        """The first of the `points` results that each block adds to, those of its points among them."""
        start = np.arange(0, self.length, self.block_size, dtype=np.int32)
        return _xp(self.knots_before).minimum(start - self.knots_before, self.num_points - self.points)


def interleave(
    knots: Float[np.ndarray | Array, "knots"],
    points: Float[np.ndarray | Array, "points"],
    block_size: int | None = None,
) -> Interleaving:
    """Interleaves ascending knots with ascending points and divides the sequence into blocks.

    From NumPy arrays all indices are NumPy arrays, and `rows` and `points` are as small as the order allows; from
    traced arrays they are large enough for any order.

    Args:
        knots: Ascending; neighbours may be equal.
        points: Ascending.
        block_size: Entries in a block; one block if not given.

    Returns:
        How they interleave.
    """
    is_static = isinstance(knots, np.ndarray) and isinstance(points, np.ndarray)
    xp = np if is_static else jnp
    n, p = knots.shape[0], points.shape[0]
    size = min(block_size or n + p, n + p)
    begins_site = xp.diff(knots, prepend=knots[:1]) > SAME_SITE * (knots[-1] - knots[0])
    site = xp.cumsum(begins_site, dtype=np.int32)
    closing = xp.searchsorted(site, site, side="right").astype(np.int32) - 1
    # A point stands before a knot at the same place, which makes no difference to the curve.
    order = xp.argsort(xp.concatenate([points, knots]), stable=True).astype(np.int32)
    entry = xp.argsort(order).astype(np.int32)
    first_entry = np.arange(0, n + p, size, dtype=np.int32)
    knots_before = xp.searchsorted(entry[p:], first_entry).astype(np.int32)

    max_rows, max_points, distinct = min(size, n), min(size, p), False
    if is_static:
        max_rows = int(np.diff(knots_before, append=n).max())
        max_points = int(np.diff(first_entry - knots_before, append=p).max())
        distinct = bool((closing == np.arange(n)).all())
    return Interleaving(order, entry, closing, knots_before, size, max_rows, max_points, distinct)


def _xp(array):
    return np if isinstance(array, np.ndarray) else jnp
