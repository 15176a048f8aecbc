"""The natural cubic smoothing spline in closed form: as a matrix, and applied to data without forming one."""

import math

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from ...checks import (
    check_ascending,
    check_mask,
    check_smoothing,
    check_values,
    check_vector,
    check_weights,
    static_value,
)
from ...linops import apply
from .linop import spline_linop


def spline_matrix(
    knots: ArrayLike,
    points: ArrayLike,
    *,
    smoothing: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    returned: ArrayLike | None = None,
) -> Float[Array, "points knots"]:
    r"""Forms the matrix that takes values at the knots to the smoothing spline's values at the points.

    The spline is linear in its data, so :math:`u(p) = M y`, where u minimises

    .. math::
        \sum_i w_i (u(t_i) - y_i)^2 + \mu \int u''(t)^2 \, dt.

    An encoder is the matrix from data nodes to worker nodes, a decoder the one from the worker nodes that returned to
    the data nodes, the smoother (hat) matrix the one from knots to knots. Rows sum to one and reproduce straight
    lines. Beyond the outermost knot with data the spline is a straight line.

    Computed in float64 whether or not JAX's x64 mode is on.

    Args:
        knots: Positions t, shape (n,), ascending; knots at one place count as one, whose value is the weighted
            mean of their data.
        points: Where to evaluate, shape (p,), in any order.
        smoothing: :math:`\mu \ge 0`, SciPy's `lam`; 0 interpolates.
        weights: w, shape (n,), not negative; ones if not given. A weight of zero is as if the knot did not exist.
        returned: Which knots have data, bool, shape (n,); all if not given.

    Returns:
        The matrix, shape (p, n), float64 where JAX's x64 mode is on, else float32. Columns of knots without data are
        zero. With data at fewer than two knots all entries are NaN; with two or more, none are.

    Raises:
        ValueError: If a concrete argument has the wrong shape, dtype or sign, or knots are not ascending.

    References:
        Green and Silverman, Nonparametric Regression and Generalized Linear Models, 1994, chapter 2;
        arXiv 2406.00300, equation 5.

    >>> spline_matrix(np.array([-1.0, 0.0, 1.0]), np.array([0.5])).tolist()
    [[-0.09375, 0.6875, 0.40625]]
    """
    linop, order = _prepare_linop(knots, points, smoothing, weights, returned)
    return linop.matrix()[order]


def smoother_matrix(
    knots: ArrayLike,
    *,
    smoothing: ArrayLike,
    weights: ArrayLike | None = None,
    returned: ArrayLike | None = None,
) -> Float[Array, "knots knots"]:
    """Forms the hat matrix, from values at the knots to the spline's values at the same knots.

    Arguments, return value and errors as for `spline_matrix`.
    """
    return spline_matrix(knots, knots, smoothing=smoothing, weights=weights, returned=returned)


def fit_and_evaluate(
    knots: ArrayLike,
    values: Shaped[Array, "knots *features"],
    points: ArrayLike,
    *,
    smoothing: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    returned: ArrayLike | None = None,
) -> Shaped[Array, "points *features"]:
    r"""Fits one smoothing spline per feature and evaluates it, in O((n + p) d) time and memory.

    Equal to `spline_matrix(...) @ values`; from a few hundred knots on, the matrix is not formed. Values at knots
    without data are ignored, NaN included.

    Args:
        knots: As for `spline_matrix`.
        values: Data, shape (n, ...).
        points: As for `spline_matrix`.
        smoothing: As for `spline_matrix`.
        weights: As for `spline_matrix`.
        returned: As for `spline_matrix`.

    Returns:
        Shape (p, ...), in the dtype of the values (integers become float32).

    Raises:
        ValueError: As for `spline_matrix`, or if the leading axis of values is not n.

    References:
        As for `spline_matrix`.

    >>> t = np.linspace(-1, 1, 5)
    >>> fit_and_evaluate(t, jnp.asarray(t**2), np.array([0.25]), returned=np.arange(5) != 1).round(3)
    Array([0.048], dtype=float32)
    """
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        values = values.astype(jnp.float32)
    linop, order = _prepare_linop(knots, points, smoothing, weights, returned)
    n = np.shape(knots)[0]
    check_values("values", values, n)
    results = apply(linop, values.reshape(n, math.prod(values.shape[1:])))[order]
    return results.reshape(results.shape[0], *values.shape[1:])


def _prepare_linop(knots, points, smoothing, weights, returned):
    """Prepares the operator to the points in ascending order, and returns each point's index in that order."""
    check_vector("knots", knots)
    check_ascending("knots", knots)
    check_vector("points", points, least=1)
    check_smoothing("smoothing", smoothing)
    n = np.shape(knots)[0]
    if weights is not None:
        check_weights("weights", weights, n)
    if returned is not None:
        check_mask("returned", returned, n)
    weights = np.ones(n) if weights is None else weights
    if returned is not None:
        static_returned, static_weights = static_value(returned), static_value(weights)
        if static_returned is None or static_weights is None:
            weights = jnp.where(jnp.asarray(returned), weights, 0)
        else:
            weights = np.where(static_returned, static_weights, 0)
    static_points = static_value(points)
    if static_points is not None:
        points = np.asarray(static_points, np.float64)
        if (np.diff(points) >= 0).all():
            return spline_linop(knots, points, smoothing, weights), slice(None)
        order = np.argsort(points)
        return spline_linop(knots, points[order], smoothing, weights), np.argsort(order)
    order = jnp.argsort(points)
    return spline_linop(knots, points[order], smoothing, weights), jnp.argsort(order)
