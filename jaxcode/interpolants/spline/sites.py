"""Merges knots that have data into sites: distinct places, whose data are weighted means."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from ..abstract import SAME_SITE, span_of


class Sites(NamedTuple):
    """Holds the places that have data, in ascending order, then places without data up to a static number.

    Attributes:
        place: Strictly ascending, shape (n,), where n is at least the number of knots.
        weight: The sum of the weights at each site, shape (n,); 1 where there are no data.
        num_present: How many sites have data, in the places' dtype.
        average: The matrix from data at knots to their weighted means at sites, shape (n, knots).
    """

    place: Float[Array, "sites"]
    weight: Float[Array, "sites"]
    num_present: Float[Array, ""]
    average: Float[Array, "sites knots"]

    @property
    def present(self) -> Bool[Array, "sites"]:
        """Which sites have data."""
        return jnp.arange(self.place.shape[0], dtype=self.place.dtype) < self.num_present


def normalise(
    knots: Float[Array, "knots"], points: Float[Array, "points"]
) -> tuple[Float[Array, "knots"], Float[Array, "points"], Float[Array, ""]]:
    """Maps knots to [0, 1], and points by the same map, so that powers of distances stay in range.

    Returns:
        The knots, the points, and the span: the length that became 1.
    """
    span = span_of(knots)
    return (knots - knots[0]) / span, (points - knots[0]) / span, span


def find_sites(knots: Float[Array, "knots"], weights: Shaped[Array, "knots"]) -> Sites:
    """Finds the places of knots whose weight is not zero, merging those at one place.

    Args:
        knots: Ascending, shape (k,).
        weights: Not negative, or bool, shape (k,).

    Returns:
        The sites; those without data follow at arbitrary places, which have no derivatives.
    """
    num_knots = knots.shape[0]
    # At least one more than the number of sites, m, from which the highest order, 4, predicts.
    size = max(num_knots, 5)
    rank = _indices(size)
    weights = weights.astype(knots.dtype)
    live, span = weights > 0, knots[-1] - knots[0]
    is_earlier = live[None] & np.tri(num_knots, k=-1, dtype=bool)
    gap = knots - jnp.max(jnp.where(is_earlier, knots[None], -jnp.inf), axis=1)
    begins_site = live & (gap > SAME_SITE * span)
    # Here and in `wiener` sums are written as matrix products, which compile in a third of the time.
    site = np.tri(num_knots) @ begins_site.astype(knots.dtype)
    is_member = live[None] & (site[None] == 1 + rank[:, None])
    num_present = site[-1]
    place = jnp.max(jnp.where(is_member, knots[None], knots[0]), axis=1)
    is_empty = rank >= num_present
    place = jnp.where(is_empty, jax.lax.stop_gradient(jnp.max(place) + (rank - num_present + 1) * (span / size)), place)
    return _make_sites(place, num_present, is_member, weights)


def replace_weights(sites: Sites, weights: Float[Array, "knots"]) -> Sites:
    """Replaces the weights of knots; the new ones are positive where the old ones are."""
    return _make_sites(sites.place, sites.num_present, sites.average > 0, weights)


def _indices(size):
    """Returns 0, 1, ... as floating-point numbers."""
    return np.arange(size, dtype=np.float64)


def _make_sites(place, num_present, is_member, weights):
    """Makes sites from a matrix (sites, knots) that says which knots are at each site."""
    weight = jnp.where(is_member, weights[None], 0)
    total = jnp.where(_indices(place.shape[0]) >= num_present, 1, weight @ np.ones(weights.shape[0]))
    return Sites(place, total, num_present, weight / total[:, None])
