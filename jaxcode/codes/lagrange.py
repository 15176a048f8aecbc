"""LCC: polynomials both ways, exact where the workers compute a polynomial and enough of them answer."""

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


@pytree("degree", eq=False)
class LagrangeCode(AbstractInterpolatingCode):
    r"""Lagrange coded computing: the polynomial through the inputs, and the one that the workers' answers then lie on.

    If f is a polynomial of degree deg f, the answers lie on one of degree :math:`D = (K-1) \deg f`, and any D+1 of them
    give it exactly. The decoder fits that degree by least squares to all that came, or with fewer than D+1 answers the
    degree that passes through them, which for a general f can be far from the truth: this is the baseline that splines
    replace.

    Attributes:
        data_nodes: alpha, strictly ascending, shape (K,).
        worker_nodes: beta, strictly ascending, shape (N,).
        degree: deg f >= 1, static.

    Raises:
        ValueError: If nodes are not strictly ascending vectors of finite numbers, or the degree not a whole number >=
            1.

    References:
        arXiv 1806.00939, section IV. Brubeck, Nakatsukasa and Trefethen, SIAM Review 63 (2021), for the orthogonal
        basis in which degrees beyond 25 keep their digits.

    >>> code = LagrangeCode.chebyshev(num_data=3, num_workers=8, degree=2)
    >>> returned = jnp.array([True, False, True, True, False, True, True, False])
    >>> code.decode(code.encode(jnp.array([1.0, 2.0, 4.0])) ** 2, returned).round(4)
    Array([ 1.,  4., 16.], dtype=float32)
    """

    data_nodes: np.ndarray | Array
    worker_nodes: np.ndarray | Array
    degree: int = 1

    def __post_init__(self):
        as_nodes(self, workers_may_share=False)
        object.__setattr__(self, "degree", check_count("degree", self.degree, least=1))

    @classmethod
    def chebyshev(cls, num_data: int, num_workers: int, *, degree: int = 1) -> "LagrangeCode":
        """Alpha Chebyshev of the first kind, beta of the second. Needs K >= 2 and N >= 2."""
        return cls(*nodes.chebyshev_pair(num_data, num_workers), degree)

    def encoding_curve(self) -> AbstractMap:
        everyone = np.ones(self.num_data, bool)
        return curve_matrix(polynomial_matrix(self.num_data - 1)(self.data_nodes, self.worker_nodes, everyone))

    def decoding_curve(self, returned: Bool[Array | np.ndarray, "workers"]) -> AbstractMap:
        degree = (self.num_data - 1) * self.degree
        return curve_matrix(polynomial_matrix(degree)(self.worker_nodes, self.data_nodes, returned), returned)


@functools.cache
def polynomial_matrix(degree: int):
    """The function (nodes, points, live) -> matrix (points, nodes) of the least-squares polynomial, in float64."""
    return in_float64(jax.jit(functools.partial(_polynomial_matrix, degree)))


def _polynomial_matrix(degree, knots, points, live):
    """Sums p_k(point) p_k(node) over polynomials orthonormal on the live nodes, each made from t p_(k-1) (Arnoldi)."""
    degree = min(degree, knots.shape[0] - 1)
    reached = jnp.minimum(degree, jnp.sum(live, dtype=jnp.int32) - 1)
    present = live.astype(knots.dtype)

    def normalised(at_knots, at_points):
        square = jnp.sum(at_knots**2)
        length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
        return at_knots / length, at_points / length

    first = normalised(present, jnp.ones_like(points))
    basis = tuple(jnp.zeros((degree + 1, v.shape[0]), v.dtype).at[0].set(v) for v in first)

    def step(carry, k):
        basis, latest, matrix = carry
        at_knots, at_points = latest[0] * knots, latest[1] * points
        for _ in range(2):  # once removes what is not new, twice what rounding left of it
            overlap = jnp.sum(basis[0] * at_knots, axis=1, keepdims=True)
            at_knots = at_knots - jnp.sum(overlap * basis[0], axis=0)
            at_points = at_points - jnp.sum(overlap * basis[1], axis=0)
        used = k <= reached
        latest = tuple(jnp.where(used, v, 0.0) for v in normalised(*_safe(used, at_knots, at_points)))
        basis = tuple(b.at[k].set(v) for b, v in zip(basis, latest, strict=True))
        return (basis, latest, matrix + latest[1][:, None] * latest[0]), None

    start = (basis, first, first[1][:, None] * first[0])
    (_, _, matrix), _ = jax.lax.scan(step, start, jnp.arange(1, degree + 1, dtype=jnp.int32))
    return matrix


def _safe(used, at_knots, at_points):
    """Past the last degree nothing new is left to normalise; ones stand in, so that no derivative divides by zero."""
    return jnp.where(used, at_knots, 1.0), jnp.where(used, at_points, 1.0)
