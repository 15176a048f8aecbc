"""BSCC: a cubic B-spline through the answers."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .. import nodes
from .._float64 import in_float64
from .._maps import AbstractMap
from .._pytree import pytree
from .abstract import AbstractInterpolatingCode, as_nodes, curve_matrix
from .barycentric import rational_matrix
from .lagrange import polynomial_matrix


@pytree("encoder", eq=False)
class BSplineCode(AbstractInterpolatingCode):
    """B-spline coded computing: Berrut's or Lagrange's encoder, cubic B-spline interpolation as decoder.

    The decoder is the interpolant in the usual basis of cubic B-splines, whose knots are the answers' nodes but for the
    second and the last but one ("not-a-knot"); beyond the outermost answers its end pieces go on as cubics. With three
    answers it is the parabola through them, with two the line. `SplineCode` differs in its end conditions (natural), in
    going on straight, and in encoding by a spline as well.

    Attributes:
        data_nodes: alpha, strictly ascending, shape (K,).
        worker_nodes: beta, strictly ascending, shape (N,).
        encoder: "berrut" or "lagrange", static.

    Raises:
        ValueError: If nodes are not strictly ascending vectors of finite numbers, or the encoder is another.

    References:
        arXiv 2601.10616; de Boor, A Practical Guide to Splines, 2001, chapter IV, for the end conditions.

    >>> code = BSplineCode.chebyshev(num_data=3, num_workers=6)
    >>> code.decode(code.encode(jnp.array([1.0, 2.0, 4.0])), jnp.ones(6, bool)).round(2)
    Array([1.  , 2.03, 4.  ], dtype=float32)
    """

    data_nodes: np.ndarray | Array
    worker_nodes: np.ndarray | Array
    encoder: Literal["berrut", "lagrange"] = "berrut"

    def __post_init__(self):
        as_nodes(self, workers_may_share=False)
        if self.encoder not in ("berrut", "lagrange"):
            raise ValueError(f"encoder is {self.encoder!r}; expected 'berrut' or 'lagrange'")

    @classmethod
    def chebyshev(
        cls, num_data: int, num_workers: int, *, encoder: Literal["berrut", "lagrange"] = "berrut"
    ) -> "BSplineCode":
        """Alpha Chebyshev of the first kind, beta of the second. Needs K >= 2 and N >= 2."""
        return cls(*nodes.chebyshev_pair(num_data, num_workers), encoder)

    def encoding_curve(self) -> AbstractMap:
        matrix = rational_matrix(0) if self.encoder == "berrut" else polynomial_matrix(self.num_data - 1)
        return curve_matrix(matrix(self.data_nodes, self.worker_nodes, np.ones(self.num_data, bool)))

    def decoding_curve(self, returned: Bool[Array | np.ndarray, "workers"]) -> AbstractMap:
        return curve_matrix(not_a_knot_matrix(self.worker_nodes, self.data_nodes, returned), returned)


@in_float64
@jax.jit
def not_a_knot_matrix(
    knots: Float[Array, "knots"], points: Float[Array, "points"], live: Bool[Array, "knots"]
) -> Float[Array, "points knots"]:
    """The matrix of cubic not-a-knot interpolation through the live knots, in float64."""
    n = knots.shape[0]
    count = jnp.sum(live, dtype=jnp.int32)
    slot = jnp.where(live, jnp.cumsum(live, dtype=jnp.int32) - 1, n)
    index = jnp.arange(n, dtype=jnp.int32)
    packed = jnp.zeros(n, knots.dtype).at[slot].set(knots, mode="drop")
    gap = jnp.where(index < count - 1, jnp.roll(packed, -1) - packed, 1.0)
    curvature = _second_derivatives(gap, count)

    lower = jnp.clip(
        jnp.searchsorted(jnp.where(index < count, packed, jnp.inf), points, side="right").astype(jnp.int32) - 1,
        0,
        jnp.maximum(count - 2, 0),
    )
    width = gap[lower][:, None]
    b = (points[:, None] - packed[lower][:, None]) / width
    a = 1 - b
    upper = jnp.minimum(lower + 1, n - 1)
    chord = jnp.where(index == lower[:, None], a, 0.0) + jnp.where(index == upper[:, None], b, 0.0)
    bend = (a**3 - a) * curvature[lower] + (b**3 - b) * curvature[upper]
    in_order = chord + width**2 / 6 * bend
    return jnp.where(live, in_order[:, jnp.minimum(slot, n - 1)], 0.0)


def _second_derivatives(gap, count):
    """The matrix from values at the packed knots to second derivatives there, ends included."""
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

    def unit(offset):
        return (index[None, :] == index[:, None] + offset).astype(gap.dtype)

    column = (slice(None), None)
    second_difference = unit(-1) / before[column] - unit(0) * (1 / before + 1 / after)[column] + unit(1) / after[column]
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

    def continued(end, inner, following, ratio):
        at_end, at_inner, at_following = (
            jnp.clip(jnp.asarray(i, jnp.int32), 0, n - 1) for i in (end, inner, following)
        )
        line = (1 + ratio[at_inner]) * curvature[at_inner] - ratio[at_inner] * curvature[at_following]
        return index == at_end, line

    is_first, first = continued(0, 1, 2, r_first)
    is_last, last = continued(count - 1, count - 2, count - 3, r_last)
    ended = jnp.where(is_first, first, jnp.where(is_last, last, curvature))
    return jnp.where(count >= 3, ended, 0.0)
