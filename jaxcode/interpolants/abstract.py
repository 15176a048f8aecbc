"""The interface of interpolants, and the operator of those given as a matrix."""

import abc
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._float64 import in_float64
from ..checks import static_value
from ..linops import AbstractLinop, Dense, split
from ..linops.dense import matmul

# Knots closer than this share of their span are one site and their values are averaged. A curve through two values
# 1e-12 apart has slopes of 1e12, which no data justify; nodes one float32 step apart are 1e5 times farther.
SAME_SITE = 1e-12

Vector = Float[Array | np.ndarray, "_"]
Places = TypeVar("Places", Array, np.ndarray)
# From knots, points and a mask of live knots to the matrix, shape (points, knots); see `dense_linop`.
MatrixFunction = Callable[[Array, Array, Array], Array]


class AbstractInterpolant(abc.ABC):
    """Draws a curve through data at knots and evaluates it at points: a linear map from data to values.

    Knots at one place form one site, whose value is the mean of their data.

    To write an interpolant, make a class that is a frozen dataclass and a pytree, declare the attributes below and
    implement the method. `dense_linop` implements it from a function that forms the matrix in JAX. This one is
    complete: it works in every code, under every transformation, with knots known to the host or traced.

    .. code-block:: python

        import jax.numpy as jnp

        import jaxcode as jc
        from jaxcode import interpolants


        @jc.pytree()
        class Linear(interpolants.AbstractInterpolant):
            '''Connects the data by straight lines; constant beyond the outermost.'''

            interpolates = True
            predicts_error = False

            def linop(self, knots, points, returned=None):
                return interpolants.dense_linop(form_matrix, knots, points, returned)


        def form_matrix(knots, points, live):
            # The nearest live knots on either side of each point weigh by their distance; one alone has all the weight.
            distance = points[:, None] - knots[None]
            lower_knot = jnp.max(jnp.where(live & (distance >= 0), knots, -jnp.inf), axis=1, keepdims=True)
            upper_knot = jnp.min(jnp.where(live & (distance < 0), knots, jnp.inf), axis=1, keepdims=True)
            is_inside = jnp.isfinite(lower_knot) & jnp.isfinite(upper_knot)
            gap = jnp.where(is_inside, upper_knot - lower_knot, 1.0)
            weight = jnp.where(is_inside, 1 - jnp.abs(distance) / gap, 1.0)
            return jnp.where(live & ((knots == lower_knot) | (knots == upper_knot)), weight, 0.0)

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

        From static arguments it is prepared on the host; from others, traced or on an accelerator, by the program.

        Args:
            knots: Ascending, shape (n,); neighbours may be equal.
            points: Ascending, shape (p,).
            returned: Which knots have data, bool (n,); all of them if not given.

        Returns:
            The operator, computed in float64. Its results are NaN with data at fewer than two knots.
        """


def dense_linop(
    form_matrix: MatrixFunction,
    knots: Vector,
    points: Vector,
    returned: Bool[Array | np.ndarray, "knots"] | None = None,
) -> Dense:
    """Prepares the operator of an interpolant from a function that forms its matrix.

    Args:
        form_matrix: From (knots, points, live) to the matrix, shape (points, knots), in JAX. It is traced in float64
            and compiled once for each function and size: pass the same function object each time. Knots and points are
            shifted and scaled together such that the knots have a span of 1 and lie within 1 of zero, which must not
            change the matrix. `live`, bool (knots,), marks the knots to use, which are distinct; columns of other knots
            may hold any finite number. See `linops.in_float64` for what it may not call.
        knots: As for `AbstractInterpolant.linop`.
        points: As for `AbstractInterpolant.linop`.
        returned: As for `AbstractInterpolant.linop`.

    Returns:
        The operator; the data of knots at one place are replaced by their mean.
    """
    live = np.ones(knots.shape[0], bool) if returned is None else returned
    static_knots = static_value(knots)
    all_distinct = static_knots is not None and bool(
        (np.diff(static_knots) > SAME_SITE * (static_knots[-1] - static_knots[0])).all()
    )
    entries = split(_compiled_matrix(form_matrix, all_distinct)(knots, points, live))
    if returned is None:
        return Dense(entries)
    xp = np if isinstance(returned, np.ndarray) else jnp
    return Dense(entries, returned, xp.broadcast_to(returned.sum() >= 2, points.shape))


def span_of(knots: Places) -> Places:
    """Returns the distance from the first of ascending knots to the last; 1 where all are equal."""
    xp = np if isinstance(knots, np.ndarray) else jnp
    span = knots[-1] - knots[0]
    return xp.where(span > 0, span, 1.0)  # pyright: ignore[reportReturnType]


@functools.cache
def _compiled_matrix(form_matrix, distinct):
    """Compiles the formation of a matrix in float64, from places in any unit."""
    form_merged = form_matrix if distinct else functools.partial(_merge_sites, form_matrix)

    def form(knots, points, live):
        # Shifted and scaled so that powers of places neither overflow nor lose digits to a large offset. The offset is
        # the number nearest to zero in the knots' interval, so that the subtraction loses no digits of a place. The
        # matrix does not depend on it.
        offset = jax.lax.stop_gradient(jnp.clip(0.0, knots[0], knots[-1]))
        unit = span_of(knots)
        return form_merged((knots - offset) / unit, (points - offset) / unit, live)

    return in_float64(jax.jit(form))


def _merge_sites(form_matrix, knots, points, live):
    """Forms the matrix of each site's first live knot, and averages the data of live knots at one site."""
    index = jnp.arange(knots.shape[0], dtype=jnp.int32)
    site = jnp.cumsum(jnp.diff(knots, prepend=knots[:1]) > SAME_SITE, dtype=jnp.int32)
    live_neighbour = (site[:, None] == site[None]) & live[None]
    is_first = live & ~jnp.any(live_neighbour & (index[None] < index[:, None]), axis=1)
    count = jnp.sum(live_neighbour, axis=1, keepdims=True, dtype=jnp.int32).astype(knots.dtype)
    # From data at the knots to their mean at each site's first live knot.
    average = jnp.where(is_first[:, None] & live_neighbour, 1 / jnp.maximum(count, 1), 0)
    return matmul(form_matrix(knots, points, is_first), average)
