"""Least-squares polynomials in an orthogonal basis."""

import functools
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._pytree import pytree
from ..checks import check_count
from ..linops import AbstractLinop
from .abstract import AbstractInterpolant, Vector, dense_linop


@final
@pytree("degree")
class Polynomial(AbstractInterpolant):
    r"""Fits the polynomial of a given degree to the data by least squares.

    With data at no more than degree + 1 knots, it is the interpolating polynomial of the degree that they determine.

    Attributes:
        degree: Static, >= 1; if None, the polynomial through all data.

    Raises:
        ValueError: If the degree is not a whole number of at least 1.

    References:
        Brubeck, Nakatsukasa and Trefethen, SIAM Review 63 (2021), for the orthogonal basis in which degrees beyond 25
        keep their digits. arXiv 1806.00939 (Lagrange coded computing).

    >>> from jaxcode.linops import apply
    >>> curve = Polynomial().linop(np.array([-1.0, 0.0, 1.0]), np.array([0.5]))
    >>> apply(curve, jnp.array([[1.0], [0.0], [1.0]]))
    Array([[0.25]], dtype=float32)
    """

    degree: int | None = None
    predicts_error = False

    def __post_init__(self):
        if self.degree is not None:
            object.__setattr__(self, "degree", check_count("degree", self.degree, least=1))

    @property
    def interpolates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.degree is None

    def linop(
        self, knots: Vector, points: Vector, returned: Bool[Array | np.ndarray, "knots"] | None = None
    ) -> AbstractLinop:
        max_degree = knots.shape[0] - 1
        degree = max_degree if self.degree is None else min(self.degree, max_degree)
        return dense_linop(_matrix_of_degree(degree), knots, points, returned)


@functools.cache
def _matrix_of_degree(degree):
    return functools.partial(_polynomial_matrix, degree)


def _polynomial_matrix(degree, knots, points, live):
    """Sums p_k(point) p_k(knot) over polynomials orthonormal on the live knots, each made from t p_(k-1) (Arnoldi)."""
    attained_degree = jnp.minimum(degree, jnp.sum(live, dtype=jnp.int32) - 1)

    def normalise(at_knots, at_points):
        square = jnp.sum(at_knots**2)
        length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
        return at_knots / length, at_points / length

    first_member = normalise(live.astype(knots.dtype), jnp.ones_like(points))
    basis = tuple(jnp.zeros((degree + 1, v.shape[0]), v.dtype).at[0].set(v) for v in first_member)

    def step(carry, k):
        basis, newest_member, matrix = carry
        at_knots, at_points = newest_member[0] * knots, newest_member[1] * points
        # Orthogonalised twice: the second pass removes the rounding errors of the first.
        for _ in range(2):
            overlap = jnp.sum(basis[0] * at_knots[None], axis=1, keepdims=True)
            at_knots = at_knots - jnp.sum(overlap * basis[0], axis=0)
            at_points = at_points - jnp.sum(overlap * basis[1], axis=0)
        is_attained = k <= attained_degree
        # Beyond the attained degree the vectors are zero; ones replace them, so that no derivative divides by zero.
        at_knots, at_points = jnp.where(is_attained, at_knots, 1.0), jnp.where(is_attained, at_points, 1.0)
        newest_member = tuple(jnp.where(is_attained, v, 0.0) for v in normalise(at_knots, at_points))
        basis = tuple(b.at[k].set(v) for b, v in zip(basis, newest_member, strict=True))
        return (basis, newest_member, matrix + newest_member[1][:, None] * newest_member[0][None]), None

    start = (basis, first_member, first_member[1][:, None] * first_member[0][None])
    (_, _, matrix), _ = jax.lax.scan(step, start, jnp.arange(1, degree + 1, dtype=jnp.int32))
    return matrix
