"""Cubic B-spline interpolation with not-a-knot ends."""

from typing import ClassVar, final

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
    """Cubic interpolation in the usual basis of B-splines, without knots at the second and the last but one datum.

    Beyond the outermost data its end pieces continue as cubics. Through three data it is the parabola, through two the
    line. `Spline` differs in its end conditions (natural) and in continuing as straight lines.

    References:
        de Boor, A Practical Guide to Splines, 2001, chapter IV, for the end conditions. arXiv 2601.10616.

    >>> from jaxcode.linops import apply
    >>> curve = NotAKnot().linop(np.array([-1.0, 0.0, 1.0]), np.array([0.5]))
    >>> apply(curve, jnp.array([[1.0], [0.0], [1.0]]))
    Array([[0.25]], dtype=float32)
    """

    interpolates: ClassVar[bool] = True  # pyright: ignore[reportIncompatibleVariableOverride]
    predicts_error: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleVariableOverride]

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
    packed = jnp.zeros(n, knots.dtype).at[slot].set(knots, mode="drop")
    gap = jnp.where(index < count - 1, jnp.roll(packed, -1) - packed, 1.0)
    curvature = _second_derivatives(gap, count)

    lower = jnp.clip(
        jnp.searchsorted(jnp.where(index < count, packed, jnp.inf), points, side="right").astype(jnp.int32) - 1,
        0,
        jnp.maximum(count - 2, 0),
    )
    width = gap[lower][:, None]
    # A single site has a constant curve.
    b = jnp.where(count > 1, (points[:, None] - packed[lower][:, None]) / width, 0.0)
    a = 1 - b
    upper = jnp.minimum(lower + 1, n - 1)
    chord = jnp.where(index[None] == lower[:, None], a, 0.0) + jnp.where(index[None] == upper[:, None], b, 0.0)
    bend = (a**3 - a) * curvature[lower] + (b**3 - b) * curvature[upper]
    packed_matrix = chord + width**2 / 6 * bend
    return jnp.where(live[None], packed_matrix[:, jnp.minimum(slot, n - 1)], 0.0)


def _second_derivatives(gap, count):
    """Forms the matrix from values at the packed knots to second derivatives there, ends included."""
    n = gap.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)
    inner = (index > 0) & (index < count - 1)
    before, after = jnp.roll(gap, 1), gap
    # The end's second derivative continues its neighbours' line: c_0 = (1 + r) c_1 - r c_2 with r = h_0 / h_1. Three
    # knots have one inner second derivative, which is the ends' too.
    three = count == 3
    r_first = jnp.where(three, 0.0, before / after)
    r_last = jnp.where(three, 0.0, after / before)
    is_first, is_last = index == 1, index == count - 2
    diagonal = (before + after) / 3 + jnp.where(is_first, before / 6 * (1 + r_first), 0.0)
    diagonal = diagonal + jnp.where(is_last, after / 6 * (1 + r_last), 0.0)
    below = jnp.where(is_first, 0.0, before / 6 - jnp.where(is_last, after / 6 * r_last, 0.0))
    above = jnp.where(is_last, 0.0, after / 6 - jnp.where(is_first, before / 6 * r_first, 0.0))

    def diagonal_matrix(offset, values):
        return jnp.where(index[None, :] == index[:, None] + offset, values[:, None], 0.0)

    second_difference = (
        diagonal_matrix(-1, 1 / before) - diagonal_matrix(0, 1 / before + 1 / after) + diagonal_matrix(1, 1 / after)
    )
    curvature = jax.lax.linalg.tridiagonal_solve(
        jnp.where(inner, below, 0.0),
        jnp.where(inner, diagonal, 1.0),
        jnp.where(inner, above, 0.0),
        jnp.where(inner[:, None], second_difference, 0.0),
    )
    return _with_ends(curvature, r_first, r_last, count)


def _with_ends(curvature, r_first, r_last, count):
    n = curvature.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)[:, None]

    def extrapolate(end, inner, next_inner, ratio):
        """Continues the line through the second derivatives of two inner knots to an end."""
        end, inner, next_inner = (jnp.clip(jnp.asarray(i, jnp.int32), 0, n - 1) for i in (end, inner, next_inner))
        line = (1 + ratio[inner]) * curvature[inner] - ratio[inner] * curvature[next_inner]
        return index == end, line[None]

    is_first, first = extrapolate(0, 1, 2, r_first)
    is_last, last = extrapolate(count - 1, count - 2, count - 3, r_last)
    complete = jnp.where(is_first, first, jnp.where(is_last, last, curvature))
    return jnp.where(count >= 3, complete, 0.0)
