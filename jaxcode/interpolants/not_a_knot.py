"""Cubic B-spline interpolation with not-a-knot ends."""

from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._pytree import pytree
from ..linops import AbstractLinop
from .abstract import AbstractInterpolant, Vector, dense_linop


@final
@pytree()
class NotAKnot(AbstractInterpolant):
    """Interpolates by the cubic B-spline without knots at the second and the last but one datum.

    Beyond the outermost data the end pieces continue as cubics. Through three data it is a parabola, through two a
    line. `Spline` differs in its end conditions (natural) and in continuing as straight lines.

    References:
        de Boor, A Practical Guide to Splines, 2001, chapter IV, for the end conditions. arXiv 2601.10616.

    >>> from jaxcode.linops import apply
    >>> curve = NotAKnot().linop(np.array([-1.0, 0.0, 1.0]), np.array([0.5]))
    >>> apply(curve, jnp.array([[1.0], [0.0], [1.0]]))
    Array([[0.25]], dtype=float32)
    """

    interpolates = True
    predicts_error = False

    def linop(
        self, knots: Vector, points: Vector, returned: Bool[Array | np.ndarray, "knots"] | None = None
    ) -> AbstractLinop:
        return dense_linop(_not_a_knot_matrix, knots, points, returned)


def _not_a_knot_matrix(knots, points, live):
    n = knots.shape[0]
    count = jnp.sum(live, dtype=jnp.int32)
    slot = jnp.where(live, jnp.cumsum(live, dtype=jnp.int32) - 1, n)
    index = jnp.arange(n, dtype=jnp.int32)
    # Live knots are moved to the front.
    live_knots = jnp.zeros(n, knots.dtype).at[slot].set(knots, mode="drop")
    gap = jnp.where(index < count - 1, jnp.roll(live_knots, -1) - live_knots, 1.0)
    curvature = _second_derivatives(gap, count)

    lower = jnp.clip(
        jnp.searchsorted(jnp.where(index < count, live_knots, jnp.inf), points, side="right").astype(jnp.int32) - 1,
        0,
        jnp.maximum(count - 2, 0),
    )
    width = gap[lower][:, None]
    # A single site has a constant curve.
    b = jnp.where(count > 1, (points[:, None] - live_knots[lower][:, None]) / width, 0.0)
    a = 1 - b
    upper = jnp.minimum(lower + 1, n - 1)
    chord = jnp.where(index[None] == lower[:, None], a, 0.0) + jnp.where(index[None] == upper[:, None], b, 0.0)
    bend = (a**3 - a) * curvature[lower] + (b**3 - b) * curvature[upper]
    live_matrix = chord + width**2 / 6 * bend
    return jnp.where(live[None], live_matrix[:, jnp.minimum(slot, n - 1)], 0.0)


def _second_derivatives(gap, count):
    """Forms the matrix from values at the live knots to second derivatives there, ends included."""
    n = gap.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)
    is_inner = (index > 0) & (index < count - 1)
    gap_before, gap_after = jnp.roll(gap, 1), gap
    # The end's second derivative continues its neighbours' line: c_0 = (1 + r) c_1 - r c_2 with r = h_0 / h_1. With
    # three knots there is one inner second derivative, which the ends take.
    has_three_knots = count == 3
    r_first = jnp.where(has_three_knots, 0.0, gap_before / gap_after)
    r_last = jnp.where(has_three_knots, 0.0, gap_after / gap_before)
    is_first, is_last = index == 1, index == count - 2
    diagonal = (gap_before + gap_after) / 3 + jnp.where(is_first, gap_before / 6 * (1 + r_first), 0.0)
    diagonal = diagonal + jnp.where(is_last, gap_after / 6 * (1 + r_last), 0.0)
    lower_diagonal = jnp.where(is_first, 0.0, gap_before / 6 - jnp.where(is_last, gap_after / 6 * r_last, 0.0))
    upper_diagonal = jnp.where(is_last, 0.0, gap_after / 6 - jnp.where(is_first, gap_before / 6 * r_first, 0.0))

    def diagonal_matrix(offset, values):
        return jnp.where(index[None, :] == index[:, None] + offset, values[:, None], 0.0)

    second_difference = (
        diagonal_matrix(-1, 1 / gap_before)
        - diagonal_matrix(0, 1 / gap_before + 1 / gap_after)
        + diagonal_matrix(1, 1 / gap_after)
    )
    curvature = jax.lax.linalg.tridiagonal_solve(
        jnp.where(is_inner, lower_diagonal, 0.0),
        jnp.where(is_inner, diagonal, 1.0),
        jnp.where(is_inner, upper_diagonal, 0.0),
        jnp.where(is_inner[:, None], second_difference, 0.0),
    )
    return _extrapolate_ends(curvature, r_first, r_last, count)


def _extrapolate_ends(curvature, r_first, r_last, count):
    n = curvature.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)[:, None]

    def extrapolate(end, inner, next_inner, ratio):
        """Continues the line through the second derivatives of two inner knots to an end."""
        end, inner, next_inner = (jnp.clip(jnp.asarray(i, jnp.int32), 0, n - 1) for i in (end, inner, next_inner))
        line = (1 + ratio[inner]) * curvature[inner] - ratio[inner] * curvature[next_inner]
        return index == end, line[None]

    is_first, first = extrapolate(0, 1, 2, r_first)
    is_last, last = extrapolate(count - 1, count - 2, count - 3, r_last)
    all_derivatives = jnp.where(is_first, first, jnp.where(is_last, last, curvature))
    return jnp.where(count >= 3, all_derivatives, 0.0)
