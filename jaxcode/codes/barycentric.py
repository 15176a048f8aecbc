"""Rational interpolation in barycentric form: BACC's Berrut interpolant and the Floater-Hormann family it begins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .. import nodes
from .._checks import check_count
from .._float64 import in_float64
from .._maps import AbstractMap
from .._pytree import pytree
from .abstract import AbstractInterpolatingCode, as_nodes, curve_matrix


@pytree(eq=False)
class BerrutCode(AbstractInterpolatingCode):
    r"""Berrut approximated coded computing (BACC): Berrut's rational interpolant both ways.

    .. math::
        u(z) = \sum_i \frac{s_i}{z - z_i} y_i \Big/ \sum_i \frac{s_i}{z - z_i}, \qquad s_i = (-1)^i,

    where i counts the answers that came, in order: kept from the full set, the signs would leave poles where answers
    are missing.

    Attributes:
        data_nodes: alpha, strictly ascending, shape (K,).
        worker_nodes: beta, strictly ascending, shape (N,).

    Raises:
        ValueError: If nodes are not strictly ascending vectors of finite numbers.

    References:
        arXiv 2009.08327, section III.

    >>> code = BerrutCode.chebyshev(num_data=3, num_workers=6)
    >>> code.decode(code.encode(jnp.array([1.0, 2.0, 4.0])), jnp.ones(6, bool)).round(2)
    Array([1.06, 2.12, 3.97], dtype=float32)
    """

    data_nodes: np.ndarray | Array
    worker_nodes: np.ndarray | Array

    def __post_init__(self):
        as_nodes(self, workers_may_share=False)

    @classmethod
    def chebyshev(cls, num_data: int, num_workers: int) -> "BerrutCode":
        """The nodes of the paper: alpha Chebyshev of the first kind, beta of the second. Needs K >= 2 and N >= 2."""
        return cls(*nodes.chebyshev_pair(num_data, num_workers))

    def encoding_curve(self) -> AbstractMap:
        return curve_matrix(rational_matrix(0)(self.data_nodes, self.worker_nodes, np.ones(self.num_data, bool)))

    def decoding_curve(self, returned: Bool[Array | np.ndarray, "workers"]) -> AbstractMap:
        return curve_matrix(rational_matrix(0)(self.worker_nodes, self.data_nodes, returned), returned)


@pytree("degree", eq=False)
class FloaterHormannCode(AbstractInterpolatingCode):
    r"""Barycentric rational interpolation of blending degree d both ways, without poles whatever the nodes.

    The interpolant blends the polynomials through every d+1 neighbouring points. Degree 0 is Berrut's; a higher degree
    converges as :math:`h^{d+1}` on smooth curves and swings more where answers are missing.

    Attributes:
        data_nodes: alpha, strictly ascending, shape (K,).
        worker_nodes: beta, strictly ascending, shape (N,).
        degree: d >= 0, static. With d or fewer answers, the degree that they allow.

    Raises:
        ValueError: If nodes are not strictly ascending vectors of finite numbers, or the degree not a whole number >=
            0.

    References:
        arXiv 2509.09435; Floater and Hormann, Numerische Mathematik 107 (2007), equation 18 for the weights.

    >>> code = FloaterHormannCode.chebyshev(num_data=3, num_workers=6, degree=2)
    >>> code.decode(code.encode(jnp.array([1.0, 2.0, 4.0])), jnp.ones(6, bool)).round(2)
    Array([1., 2., 4.], dtype=float32)
    """

    data_nodes: np.ndarray | Array
    worker_nodes: np.ndarray | Array
    degree: int = 3

    def __post_init__(self):
        as_nodes(self, workers_may_share=False)
        object.__setattr__(self, "degree", check_count("degree", self.degree, least=0))

    @classmethod
    def chebyshev(cls, num_data: int, num_workers: int, *, degree: int = 3) -> "FloaterHormannCode":
        """Alpha Chebyshev of the first kind, beta of the second. Needs K >= 2 and N >= 2."""
        return cls(*nodes.chebyshev_pair(num_data, num_workers), degree)

    def encoding_curve(self) -> AbstractMap:
        matrix = rational_matrix(self.degree)
        return curve_matrix(matrix(self.data_nodes, self.worker_nodes, np.ones(self.num_data, bool)))

    def decoding_curve(self, returned: Bool[Array | np.ndarray, "workers"]) -> AbstractMap:
        return curve_matrix(rational_matrix(self.degree)(self.worker_nodes, self.data_nodes, returned), returned)


@functools.cache
def rational_matrix(degree: int):
    """The function (nodes, points, live) -> matrix (points, nodes) of the interpolant of one degree, in float64."""
    return in_float64(jax.jit(functools.partial(_rational_matrix, degree)))


def _rational_matrix(degree, knots, points, live):
    weights = _blending_weights(degree, knots, live)
    distance = points[:, None] - knots[None, :]
    # Multiplied through by the distance to the nearest node, every term is finite, and smooth where the point meets it.
    reach = jnp.where(live, jnp.abs(distance), jnp.inf)
    closest = (reach == jnp.min(reach, axis=1, keepdims=True)) & live
    nearest = closest & (jnp.cumsum(closest, axis=1, dtype=jnp.int32) == 1)
    to_nearest = jnp.sum(jnp.where(nearest, distance, 0), axis=1, keepdims=True)
    other = jnp.where(nearest | ~live, 1.0, distance)
    terms = weights * jnp.where(nearest, 1.0, to_nearest / other)
    total = jnp.sum(terms, axis=1, keepdims=True)
    return terms / jnp.where(total == 0, 1.0, total)


def _blending_weights(degree, knots, live):
    """Weights of the knots that are live, alternating in sign among them; zero for the others."""
    n = knots.shape[0]
    degree = min(degree, n - 1)
    rank = jnp.cumsum(live, dtype=jnp.int32) - 1
    count = jnp.sum(live, dtype=jnp.int32)
    reached = jnp.minimum(degree, count - 1)
    # Live knots moved to the front, so that neighbours are neighbours.
    slot = jnp.where(live, rank, n)
    packed = jnp.zeros(n, knots.dtype).at[slot].set(knots, mode="drop")
    index = jnp.arange(n, dtype=jnp.int32)
    offsets = jnp.arange(degree + 1, dtype=jnp.int32)
    member = index[:, None] + offsets  # the knots of the polynomial that starts at each
    valid = (member < count) & (offsets <= reached) & (index[:, None] + reached < count)
    at = packed[jnp.minimum(member, n - 1)]
    pair = valid[:, :, None] & valid[:, None, :] & (offsets[:, None] != offsets)
    apart = jnp.abs(at[:, :, None] - at[:, None, :])
    # In units of the widest polynomial, so that products neither over- nor underflow.
    unit = jnp.max(jnp.where(pair, apart, 0.0), initial=0.0)
    share = jnp.where(valid, jnp.prod(jnp.where(pair, unit / jnp.where(pair, apart, 1.0), 1.0), axis=2), 0.0)
    summed = jnp.zeros(n, knots.dtype).at[jnp.where(valid, member, n)].add(share, mode="drop")
    signed = jnp.where(index % 2 == 0, 1.0, -1.0) * summed / jnp.maximum(jnp.max(summed), jnp.finfo(summed.dtype).tiny)
    return jnp.where(live, signed[jnp.maximum(rank, 0)], 0.0)
