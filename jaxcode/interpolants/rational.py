"""Rational interpolation in barycentric form: Berrut's interpolant and the Floater-Hormann family."""

import functools
from typing import final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._pytree import pytree
from ..checks import check_count
from ..linops import AbstractLinop
from .abstract import AbstractInterpolant, Vector, dense_linop


@final
@pytree()
class Berrut(AbstractInterpolant):
    r"""Interpolates by Berrut's rational function, which has no poles on the real line.

    .. math::
        u(z) = \sum_i \frac{s_i}{z - z_i} y_i \Big/ \sum_i \frac{s_i}{z - z_i}, \qquad s_i = (-1)^i,

    where i counts the knots that have data, in ascending order: the signs of the full set of knots would cause poles
    where data are missing.

    References:
        Berrut, Computers and Mathematics with Applications 15 (1988). arXiv 2009.08327, section III.

    >>> from jaxcode.linops import apply
    >>> curve = Berrut().linop(np.array([-1.0, 0.0, 1.0]), np.array([0.0, 0.5]))
    >>> apply(curve, jnp.array([[1.0], [2.0], [4.0]])).round(3)
    Array([[2. ],
           [3.4]], dtype=float32)
    """

    interpolates = True
    predicts_error = False

    def linop(
        self, knots: Vector, points: Vector, returned: Bool[Array | np.ndarray, "knots"] | None = None
    ) -> AbstractLinop:
        return dense_linop(_matrix_of_degree(0), knots, points, returned)


@final
@pytree("degree")
class FloaterHormann(AbstractInterpolant):
    r"""Interpolates by a barycentric rational function of blending degree d, without poles whatever the knots.

    The interpolant blends the polynomials through every d+1 neighbouring knots. Degree 0 is `Berrut`; a higher degree
    converges as :math:`h^{d+1}` on smooth curves and oscillates more where data are missing.

    Attributes:
        degree: d >= 0, static. With data at d or fewer knots, the highest degree that they determine.

    Raises:
        ValueError: If the degree is not a whole number >= 0.

    References:
        Floater and Hormann, Numerische Mathematik 107 (2007), equation 18 for the weights. arXiv 2509.09435.
    """

    degree: int = 3
    interpolates = True
    predicts_error = False

    def __post_init__(self):
        object.__setattr__(self, "degree", check_count("degree", self.degree, least=0))

    def linop(
        self, knots: Vector, points: Vector, returned: Bool[Array | np.ndarray, "knots"] | None = None
    ) -> AbstractLinop:
        return dense_linop(_matrix_of_degree(self.degree), knots, points, returned)


@functools.cache
def _matrix_of_degree(degree):
    return functools.partial(_rational_matrix, degree)


def _rational_matrix(degree, knots, points, live):
    weights = _blending_weights(degree, knots, live)
    live = live[None]
    distance = points[:, None] - knots[None]
    # Terms are multiplied by the distance to the nearest knot: so they are finite, and smooth where a point is a knot.
    magnitude = jnp.where(live, jnp.abs(distance), jnp.inf)
    minimal = (magnitude == jnp.min(magnitude, axis=1, keepdims=True)) & live
    nearest = minimal & (jnp.cumsum(minimal, axis=1, dtype=jnp.int32) == 1)
    to_nearest = jnp.sum(jnp.where(nearest, distance, 0), axis=1, keepdims=True)
    divisor = jnp.where(nearest | ~live, 1.0, distance)
    terms = weights[None] * jnp.where(nearest, 1.0, to_nearest / divisor)
    total = jnp.sum(terms, axis=1, keepdims=True)
    return terms / jnp.where(total == 0, 1.0, total)


def _blending_weights(degree, knots, live):
    """Computes the weights of live knots, alternating in sign among them; zero for the others."""
    n = knots.shape[0]
    degree = min(degree, n - 1)
    rank = jnp.cumsum(live, dtype=jnp.int32) - 1
    count = jnp.sum(live, dtype=jnp.int32)
    attained_degree = jnp.minimum(degree, count - 1)
    # Live knots are moved to the front, so that neighbours in the curve are neighbours in the array.
    slot = jnp.where(live, rank, n)
    live_knots = jnp.zeros(n, knots.dtype).at[slot].set(knots, mode="drop")
    index = jnp.arange(n, dtype=jnp.int32)
    offsets = jnp.arange(degree + 1, dtype=jnp.int32)
    # Polynomial i goes through the live knots i to i + degree.
    member = index[:, None] + offsets[None]
    valid = (member < count) & (offsets <= attained_degree)[None] & (index + attained_degree < count)[:, None]
    position = live_knots[jnp.minimum(member, n - 1)]
    pair = valid[:, :, None] & valid[:, None, :] & (offsets[:, None] != offsets[None])[None]
    distance = jnp.abs(position[:, :, None] - position[:, None, :])
    # In units of the widest polynomial, so that products neither over- nor underflow.
    unit = jnp.max(jnp.where(pair, distance, 0.0), initial=0.0)
    factors = jnp.where(pair, unit / jnp.where(pair, distance, 1.0), 1.0)
    contribution = jnp.where(valid, jnp.prod(factors, axis=2), 0.0)
    totals = jnp.zeros(n, knots.dtype).at[jnp.where(valid, member, n)].add(contribution, mode="drop")
    largest = jnp.max(totals)
    signed_weights = jnp.where(index % 2 == 0, 1.0, -1.0) * totals / jnp.where(largest > 0, largest, 1.0)
    return jnp.where(live, signed_weights[jnp.maximum(rank, 0)], 0.0)
