"""The interface of interpolants, and what those given as a matrix share."""

import abc
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._float64 import in_float64
from ..checks import static_value
from ..linops import AbstractLinop, Dense, split

# Knots closer than this share of their span are one site and their values are averaged. A curve through two values
# 1e-12 apart has slopes of 1e12, which no data justify; nodes one float32 step apart are 1e5 times farther.
SAME_SITE = 1e-12

Vector = Float[Array | np.ndarray, "_"]
# From knots, points and which knots have data to the matrix (points, knots), in float64; knots with data are distinct.
MatrixSolver = Callable[[Array, Array, Array], Array]


class AbstractInterpolant(abc.ABC):
    """Draws a curve through data at knots and reads it at points: a linear map from data to values.

    A concrete interpolant is a frozen dataclass registered as a pytree (`jaxcode.pytree`). Knots at one place count as
    one site, whose value is the mean of the data there.

    Attributes:
        interpolates: Whether the curve is known to pass through the data of distinct knots, however many have data.
        predicts_error: Whether there is a method `standard_errors(knots, values, points, returned)`: with the arguments
            of `linop` and data of shape (n, features), it gives standard errors of the curve, shape (p, features).
    """

    interpolates: bool
    predicts_error: bool

    @abc.abstractmethod
    def linop(
        self, knots: Vector, points: Vector, returned: Bool[Array | np.ndarray, "knots"] | None = None
    ) -> AbstractLinop:
        """Prepares the operator from data at the knots to the curve's values at the points.

        What the host knows is prepared there; what is traced or lies on an accelerator, by the program.

        Args:
            knots: Ascending, shape (n,); neighbours may be equal.
            points: Ascending, shape (p,).
            returned: Which knots have data, bool (n,); all of them if not given.

        Returns:
            The operator, computed in float64. Its results are NaN with data at fewer than two knots.
        """


def dense_linop(
    solver: MatrixSolver, knots: Vector, points: Vector, returned: Bool[Array | np.ndarray, "knots"] | None
) -> Dense:
    """Prepares the operator of an interpolant whose matrix a solver gives.

    Args:
        solver: From (knots, points, live) to the matrix, with zero columns for knots that are not live; live knots are
            distinct. Computed in float64.
        knots: As for `AbstractInterpolant.linop`.
        points: As for `AbstractInterpolant.linop`.
        returned: As for `AbstractInterpolant.linop`.
    """
    live = np.ones(knots.shape[0], bool) if returned is None else returned
    static_knots = static_value(knots)
    if static_knots is None or not (np.diff(static_knots) > SAME_SITE * (static_knots[-1] - static_knots[0])).all():
        solver = _merge_sites(solver)
    entries = split(solver(knots, points, live))
    if returned is None:
        return Dense(entries)
    xp = np if isinstance(returned, np.ndarray) else jnp
    defined = xp.broadcast_to(returned.sum() >= 2, points.shape)
    return Dense(entries, returned, defined)


@functools.cache
def _merge_sites(solver):
    """Has a solver see each site once, by its first live knot, and averages the data of live knots at one site."""

    def merged_solver(knots, points, live):
        # Indices are int32 throughout: with x64 off, parts that are lowered later would return these for int64.
        index = jnp.arange(knots.shape[0], dtype=jnp.int32)
        gaps = jnp.diff(knots, prepend=knots[:1])
        site = jnp.cumsum(gaps > SAME_SITE * (knots[-1] - knots[0]), dtype=jnp.int32)
        live_neighbour = (site[:, None] == site[None]) & live[None]
        first_live = jax.lax.argmax(live_neighbour, 1, jnp.int32)
        matrix = solver(knots, points, live & (first_live == index))
        share = live / jnp.maximum(jnp.sum(live_neighbour, axis=1, dtype=knots.dtype), 1)
        return matrix[:, first_live] * share[None]

    return in_float64(jax.jit(merged_solver))
