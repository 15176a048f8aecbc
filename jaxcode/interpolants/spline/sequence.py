"""The order of knots and points in one ascending sequence, and its blocks. Indices only: nothing to differentiate."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..._pytree import pytree
from ..abstract import SAME_SITE

Indices = Int[np.ndarray | Array, "..."]


@pytree("block", "rows", "points", "distinct", eq=False)
class Sequence:
    """How n knots and p points interleave in one sequence of n + p entries, which is divided into blocks.

    Knots at one place form a site. A site is observed at the entry of its last knot, which closes it.

    Attributes:
        order: Entry to index into points followed by knots, shape (n + p,).
        entry: Index into points followed by knots to entry, shape (p + n,).
        closing: Knot to the last knot of its site, shape (n,).
        knots_before: Block to the number of knots before it, shape (blocks,).
        block: Entries in a block; the last block is padded with empty ones. Static.
        rows: The largest number of knots in a block, whose data it reads. Static.
        points: The largest number of points in a block. Static.
        distinct: Whether all knots are known to be distinct sites. Static.
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
        """p, the number of points."""
        return self.order.shape[0] - self.closing.shape[0]

    @property
    def length(self) -> int:
        """The number of entries, with the padding of the last block."""
        return -(-self.order.shape[0] // self.block) * self.block

    @property
    def first_row(self) -> Indices:
        """Block to the first of the `rows` rows of data that it reads; its knots are among them."""
        return _xp(self.knots_before).minimum(self.knots_before, self.closing.shape[0] - self.rows)

    @property
    def first_point(self) -> Indices:
        """Block to the first of the `points` results that it adds to; its points are among them."""
        start = np.arange(0, self.length, self.block, dtype=np.int32)
        return _xp(self.knots_before).minimum(start - self.knots_before, self.num_points - self.points)


def arrange(
    knots: Float[np.ndarray | Array, "knots"], points: Float[np.ndarray | Array, "points"], block: int | None = None
) -> Sequence:
    """Interleaves ascending knots with ascending points and cuts the sequence into blocks.

    For NumPy arrays all is NumPy, and `rows` and `points` are as small as their order allows; for traced arrays they
    are large enough for any order.

    Args:
        knots: Ascending; neighbours may be equal.
        points: Ascending.
        block: Entries in a block; one block if not given.
    """
    static = isinstance(knots, np.ndarray) and isinstance(points, np.ndarray)
    xp = np if static else jnp
    n, p = knots.shape[0], points.shape[0]
    size = min(block or n + p, n + p)
    begins_site = xp.diff(knots, prepend=knots[:1]) > SAME_SITE * (knots[-1] - knots[0])
    site = xp.cumsum(begins_site, dtype=np.int32)
    closing = xp.searchsorted(site, site, side="right").astype(np.int32) - 1
    # A point stands before a knot at the same place, which makes no difference to the curve.
    order = xp.argsort(xp.concatenate([points, knots]), stable=True).astype(np.int32)
    entry = xp.argsort(order).astype(np.int32)
    first_entry = np.arange(0, n + p, size, dtype=np.int32)
    knots_before = xp.searchsorted(entry[p:], first_entry).astype(np.int32)

    max_rows, max_points, distinct = min(size, n), min(size, p), False
    if static:
        max_rows = int(np.diff(knots_before, append=n).max())
        max_points = int(np.diff(first_entry - knots_before, append=p).max())
        distinct = bool((closing == np.arange(n)).all())
    return Sequence(order, entry, closing, knots_before, size, max_rows, max_points, distinct)


def _xp(array):
    return np if isinstance(array, np.ndarray) else jnp
