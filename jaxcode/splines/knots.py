"""Which knots carry data, and where a point falls among them. Everything here is knot-sized and in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Knots closer than this share of their span are one knot and their values are averaged. A curve through two values
# 1e-12 apart has slopes of 1e12, which no data justify; nodes one float32 step apart are 1e5 times farther.
_SAME_PLACE = 1e-12


class Sites(NamedTuple):
    """The distinct places at which there are data: knots without data left out, knots at one place put together.

    There are n sites for n knots, so that shapes do not depend on the mask; those from `num_sites` on are empty.

    Attributes:
        of_knot: The site of each knot; n for a knot without data.
        opens: Whether a knot is the first of its site.
        closes: Whether a knot is the last of its site.
        position: Where each site is; empty sites repeat the last position.
        weight: Total weight of the knots of each site; 1 for an empty one.
        last_knot: The knot that closes each site; 0 for an empty one.
        num_sites: How many sites have data.
    """

    of_knot: Int[Array, "knots"]
    opens: Bool[Array, "knots"]
    closes: Bool[Array, "knots"]
    position: Float[Array, "knots"]
    weight: Float[Array, "knots"]
    last_knot: Int[Array, "knots"]
    num_sites: Int[Array, ""]


def find_sites(knots: Float[Array, "knots"], weights: Float[Array, "knots"]) -> Sites:
    """Finds the sites of ascending knots.

    Args:
        knots: Positions, ascending; neighbours may be equal.
        weights: Not negative; zero leaves the knot out, exactly as if it had not been given.

    Returns:
        The sites, in ascending order.
    """
    n = knots.shape[0]
    # int32 throughout: batching an indexing by int64 with x64 off fails.
    index = jnp.arange(n, dtype=jnp.int32)
    live = weights > 0
    same = _SAME_PLACE * (knots[-1] - knots[0])
    nowhere = jnp.full(1, jnp.inf, knots.dtype)
    below = jnp.concatenate([-nowhere, jax.lax.cummax(jnp.where(live, knots, -jnp.inf))[:-1]])
    above = jnp.concatenate([jax.lax.cummin(jnp.where(live, knots, jnp.inf), reverse=True)[1:], nowhere])
    opens = live & (knots - below > same)
    closes = live & (above - knots > same)
    count = jnp.sum(opens, dtype=jnp.int32)
    of_knot = jnp.where(live, jnp.cumsum(opens, dtype=jnp.int32) - 1, n)

    def per_site(of_each_knot):
        return jnp.zeros(n, of_each_knot.dtype).at[of_knot].add(of_each_knot, mode="drop")

    filled = index < count
    position = per_site(jnp.where(closes, knots, 0))
    weight = per_site(weights)
    return Sites(
        of_knot=of_knot,
        opens=opens,
        closes=closes,
        position=jnp.where(filled, position, position[count - 1]),
        weight=jnp.where(filled, weight, 1),
        last_knot=per_site(jnp.where(closes, index, 0)),
        num_sites=count,
    )


class Bracket(NamedTuple):
    """A point between two neighbouring sites (or outside all of them, seen from the two nearest).

    Attributes:
        lower: Index of the lower site.
        upper: Index of the upper site; the same where there is only one.
        gap: Distance between the two; 1 where there is only one.
        share: How far the point is from lower to upper; below 0 or above 1 where it lies outside all sites.
    """

    lower: Int[Array, "points"]
    upper: Int[Array, "points"]
    gap: Float[Array, "points"]
    share: Float[Array, "points"]


def find_brackets(sites: Sites, points: Float[Array, "points"]) -> Bracket:
    """Finds the two sites that each point is evaluated from."""
    n = sites.position.shape[0]
    ends = jnp.where(jnp.arange(n, dtype=jnp.int32) < sites.num_sites, sites.position, jnp.inf)
    lower = jnp.clip(
        jnp.searchsorted(ends, points, side="right").astype(jnp.int32) - 1, 0, jnp.maximum(sites.num_sites - 2, 0)
    )
    upper = jnp.minimum(lower + 1, jnp.maximum(sites.num_sites - 1, 0))
    gap = jnp.where(upper > lower, sites.position[upper] - sites.position[lower], 1.0)
    share = jnp.where(upper > lower, (points - sites.position[lower]) / gap, 0.0)
    return Bracket(lower, upper, gap, share)
