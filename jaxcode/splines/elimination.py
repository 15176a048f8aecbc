r"""The normal equations of the natural cubic smoothing spline, eliminated one site after the other.

With values :math:`g_j` and second derivatives :math:`\gamma_j` at sites a distance :math:`h_j` apart, the minimiser of
:math:`\sum_j w_j (g(t_j) - y_j)^2 + \mu \int g''^2` satisfies (Green and Silverman 1994, section 2.1)

.. math::
    w_j g_j + \mu (Q \gamma)_j = w_j y_j, \qquad (Q^T g)_j - (R \gamma)_j = 0, \qquad \gamma_1 = \gamma_n = 0.

Taken in pairs :math:`z_j = (g_j, \gamma_j)` these are 2 x 2-block-tridiagonal equations
:math:`L_j z_{j-1} + D_j z_j + U_j z_{j+1} = (w_j y_j, 0)`. Every pivot's determinant is a sum of terms of one sign, so
elimination without pivoting loses nothing: where the usual equations for :math:`\gamma` alone (Reinsch 1967), whose
condition number is that of a fourth difference, are wrong in every digit, these hold ten
(`tests/benchmarks/accuracy.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .knots import Bracket, Sites, find_brackets, find_sites


class Elimination(NamedTuple):
    r"""Coefficients of the two sweeps that take values at the knots to :math:`z = (g, \gamma)`.

    They are per knot, in the order of the data, so that the data are read where they lie: forward
    :math:`r_i = A_i r_{i-1} + b_i y_i`, backward :math:`z_i = c_i r_i + B_i z_{i+1}`. A knot without data hands on
    what it is given. At the last knot of each site z is the site's.

    Attributes:
        carry_forward: A.
        take: b.
        keep: c, zero or one.
        carry_backward: B.
    """

    carry_forward: Float[Array, "knots 2 2"]
    take: Float[Array, "knots 2"]
    keep: Float[Array, "knots"]
    carry_backward: Float[Array, "knots 2 2"]


class Reading(NamedTuple):
    r"""How to read the curve at points: :math:`u_p = e_p^- \cdot z_{i_p^-} + e_p^+ \cdot z_{i_p^+}`.

    Attributes:
        lower: Index of the knot that holds the lower site's z.
        upper: Index of the knot that holds the upper site's z.
        from_lower: Coefficients of the lower site's :math:`(g, \gamma)`.
        from_upper: Coefficients of the upper site's.
    """

    lower: Array
    upper: Array
    from_lower: Float[Array, "points 2"]
    from_upper: Float[Array, "points 2"]


def eliminate(
    knots: Float[Array, "knots"],
    weights: Float[Array, "knots"],
    smoothing: Float[Array, ""],
    points: Float[Array, "points"],
) -> tuple[Elimination, Reading]:
    r"""Prepares a smoothing spline for any data at the knots and for evaluation at the points.

    Args:
        knots: Ascending, float64; neighbours may be equal.
        weights: Not negative, float64; zero leaves the knot out.
        smoothing: :math:`\mu \ge 0`.
        points: Anywhere, float64.

    Returns:
        What the sweeps and the reading need. All finite, even with one weight above zero or none.
    """
    sites = find_sites(knots, weights)
    pivots, back = _factor(sites, smoothing)
    knot_site = jnp.minimum(sites.of_knot, knots.shape[0] - 1)
    identity = jnp.eye(2, dtype=knots.dtype)

    def where(flag, chosen, other):
        return jnp.where(flag[:, None, None], chosen, other)

    lower_block = times(pivots, _blocks(sites, smoothing)[0])
    sweeps = Elimination(
        carry_forward=where(sites.opens, -lower_block[knot_site], identity),
        take=weights[:, None] * pivots[knot_site, :, 0],
        keep=sites.closes.astype(knots.dtype),
        carry_backward=where(sites.closes, -back[knot_site], identity),
    )
    return sweeps, _reading(sites, find_brackets(sites, points))


def _blocks(sites: Sites, smoothing) -> tuple[Array, Array, Array]:
    """The blocks L, D and U of every site; an empty site has the identity."""
    index = jnp.arange(sites.position.shape[0], dtype=jnp.int32)
    has_next = index < sites.num_sites - 1
    has_previous = (index > 0) & (index < sites.num_sites)
    gap = jnp.where(has_next, jnp.roll(sites.position, -1) - sites.position, 1.0)
    after, before = gap, jnp.roll(gap, 1)
    inner = has_next & has_previous
    zero, one = jnp.zeros_like(gap), jnp.ones_like(gap)

    def block(value_row, curvature_row):
        return jnp.stack([jnp.stack(value_row, -1), jnp.stack(curvature_row, -1)], -2)

    bend = 1 / before + 1 / after
    lower = block(
        [zero, jnp.where(has_previous, smoothing / before, 0)],
        [jnp.where(inner, 1 / before, 0), jnp.where(inner, -before / 6, 0)],
    )
    diagonal = block(
        [jnp.where(index < sites.num_sites, sites.weight, one), jnp.where(inner, -smoothing * bend, 0)],
        [jnp.where(inner, -bend, 0), jnp.where(inner, -(before + after) / 3, one)],
    )
    upper = block(
        [zero, jnp.where(has_next, smoothing / after, 0)],
        [jnp.where(inner, 1 / after, 0), jnp.where(inner, -after / 6, 0)],
    )
    return lower, diagonal, upper


def _factor(sites: Sites, smoothing) -> tuple[Array, Array]:
    r"""Inverse pivots :math:`P_j = (D_j - L_j C_{j-1})^{-1}` and :math:`C_j = P_j U_j` of every site."""

    def step(previous_back, blocks):
        lower, diagonal, upper = blocks
        pivot = _inverse(diagonal - times(lower, previous_back))
        back = times(pivot, upper)
        return back, (pivot, back)

    blocks = _blocks(sites, smoothing)
    return jax.lax.scan(step, jnp.zeros((2, 2), sites.position.dtype), blocks)[1]


def times(a: Float[Array, "... i j"], b: Float[Array, "... j k"]) -> Float[Array, "... i k"]:
    """The product of matrices, without the dot that would lose its float64 when batched with x64 off."""
    return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)


def _inverse(matrix):
    (a, b), (c, d) = matrix
    return jnp.stack([jnp.stack([d, -b]), jnp.stack([-c, a])]) / (a * d - b * c)


def _reading(sites: Sites, at: Bracket) -> Reading:
    r"""On :math:`[t_j, t_{j+1}]` the cubic, outside the hull the straight line that continues it."""
    b, a = at.share, 1 - at.share
    # Outside, the end's own second derivative is zero, and the inner site's sets the slope.
    bend_a = jnp.where(b < 0, 0, jnp.where(b > 1, b - 1, a * (a * a - 1)))
    bend_b = jnp.where(b < 0, -b, jnp.where(b > 1, 0, b * (b * b - 1)))
    scale = at.gap**2 / 6
    alone = at.lower == at.upper
    return Reading(
        lower=sites.last_knot[at.lower],
        upper=sites.last_knot[at.upper],
        from_lower=jnp.stack([a, scale * bend_a], -1),
        from_upper=jnp.where(alone[:, None], 0.0, jnp.stack([b, scale * bend_b], -1)),
    )
