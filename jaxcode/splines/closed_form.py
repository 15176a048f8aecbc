"""The natural cubic smoothing spline as a matrix, and applied straight to data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped

from .._checks import check_ascending, check_mask, check_smoothing, check_vector, check_weights
from .._float64 import in_float64
from .elimination import Elimination, Reading, eliminate, times


def spline_matrix(
    knots: ArrayLike,
    points: ArrayLike,
    *,
    smoothing: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    returned: ArrayLike | None = None,
) -> Float[Array, "points knots"]:
    r"""The matrix that takes values at the knots to the smoothing spline's values at the points.

    The spline is linear in its data, so :math:`u(p) = M y`, where u minimises

    .. math::
        \sum_i w_i (u(t_i) - y_i)^2 + \mu \int u''(t)^2 \, dt.

    An encoder is the matrix from data nodes to worker nodes, a decoder the one from the worker nodes that returned to
    the data nodes, the smoother (hat) matrix the one from knots to knots. Rows sum to one and reproduce straight
    lines. Beyond the outermost knot with data the spline is a straight line.

    Costs O(n min(n, p)) for n knots and p points, computed in float64 whether or not JAX's x64 mode is on.

    Args:
        knots: Positions t, shape (n,), ascending; knots at one place count as one whose value is their weighted mean.
        points: Where to evaluate, shape (p,), any order.
        smoothing: :math:`\mu \ge 0`, SciPy's `lam`; 0 interpolates.
        weights: w, shape (n,), not negative; ones if not given. A zero removes the knot exactly.
        returned: Which knots have data, bool, shape (n,); all if not given.

    Returns:
        The matrix, shape (p, n), float64 where JAX's x64 mode is on, else float32. Columns of knots without data are
        zero. With data at fewer than two knots all entries are NaN; with two or more, none.

    Raises:
        ValueError: If a concrete argument has the wrong shape, dtype or sign, or knots are not ascending.

    References:
        Green and Silverman, Nonparametric Regression and Generalized Linear Models, 1994, chapter 2;
        arXiv 2406.00300, equation 5.

    >>> spline_matrix(np.array([-1.0, 0.0, 1.0]), np.array([0.5])).tolist()
    [[-0.09375, 0.6875, 0.40625]]
    """
    dtype = jnp.result_type(float)
    _check(knots, points, smoothing, weights, returned)
    arguments = _arguments(knots, points, smoothing, weights, returned)
    return jnp.where(_enough(arguments), _matrix(*arguments).astype(dtype), jnp.nan)


def smoother_matrix(
    knots: ArrayLike,
    *,
    smoothing: ArrayLike,
    weights: ArrayLike | None = None,
    returned: ArrayLike | None = None,
) -> Float[Array, "knots knots"]:
    """The hat matrix: values at the knots to the spline's own values there. Arguments as for `spline_matrix`."""
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

    The same as `spline_matrix(...) @ values` without forming the matrix: two sweeps over the knots and one reading of
    the sites next to each point. Values at knots without data are not read: NaN there changes nothing.

    Args:
        knots: As for `spline_matrix`.
        values: Data, shape (n, ...).
        points: As for `spline_matrix`.
        smoothing: As for `spline_matrix`.
        weights: As for `spline_matrix`.
        returned: As for `spline_matrix`.

    Returns:
        Shape (p, ...), in the dtype of the values (integers become float32). The sweeps run in float64: with knots far
        closer to each other than others, or much smoothing, small results are differences of large intermediate ones.

    Raises:
        ValueError: As for `spline_matrix`, or if the values' leading axis is not the knots'.

    References:
        As for `spline_matrix`.

    >>> t = np.linspace(-1, 1, 5)
    >>> fit_and_evaluate(t, jnp.asarray(t**2), np.array([0.25]), returned=np.arange(5) != 1).round(3)
    Array([0.048], dtype=float32)
    """
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        values = values.astype(jnp.float32)
    _check(knots, points, smoothing, weights, returned)
    if values.ndim < 1 or values.shape[0] != np.shape(knots)[0]:
        raise ValueError(
            f"values has shape {values.shape}; expected its leading axis to be the {np.shape(knots)[0]} knots"
        )
    arguments = _arguments(knots, points, smoothing, weights, returned)
    return jnp.where(_enough(arguments), _fit_and_evaluate(*arguments, values).astype(values.dtype), jnp.nan)


@in_float64
def float64_spline_matrix(
    knots: Float[Array, "knots"],
    points: Float[Array, "points"],
    smoothing: Float[Array, ""],
    returned: Bool[Array, "knots"],
) -> Float[Array, "points knots"]:
    """`spline_matrix` for codes: in float64, unchecked, and with fewer than two knots' data finite but meaningless."""
    return _matrix(knots, points, smoothing, jnp.ones_like(knots), returned)


def _check(knots, points, smoothing, weights, returned):
    check_vector("knots", knots)
    check_ascending("knots", knots)
    check_vector("points", points, least=1)
    check_smoothing("smoothing", smoothing)
    if weights is not None:
        check_weights("weights", weights, np.shape(knots)[0])
    if returned is not None:
        check_mask("returned", returned, np.shape(knots)[0])


def _arguments(knots, points, smoothing, weights, returned):
    """The arguments in the order of what follows, with weights and mask for all knots."""
    n = np.shape(knots)[0]
    weights = np.ones(n) if weights is None else weights
    return knots, points, smoothing, weights, np.ones(n, bool) if returned is None else returned


def _enough(arguments):
    *_, weights, returned = arguments
    return jnp.sum(jnp.asarray(returned) & (jnp.asarray(weights) > 0)) >= 2


@in_float64
@jax.jit
def _matrix(knots, points, smoothing, weights, returned):
    weights = jnp.where(returned, weights, 0)
    sweeps, reading = eliminate(knots, weights, smoothing, points)
    apply = partial(_sweep_and_read, sweeps, reading)
    n, p = knots.shape[0], points.shape[0]
    if n <= p:
        return apply(jnp.eye(n))
    # Fewer points than knots: the sweeps run in reverse, one column for each point.
    (transposed,) = jax.linear_transpose(apply, jax.ShapeDtypeStruct((n, p), knots.dtype))(jnp.eye(p))
    return transposed.T


@in_float64
@jax.jit
def _fit_and_evaluate(knots, points, smoothing, weights, returned, values):
    weights = jnp.where(returned, weights, 0)
    rows = jnp.where(weights[:, None] > 0, values.reshape(values.shape[0], -1), 0)
    out = _sweep_and_read(*eliminate(knots, weights, smoothing, points), rows)
    return out.reshape(-1, *values.shape[1:])


def _sweep_and_read(sweeps: Elimination, reading: Reading, rows: Array) -> Array:
    """Values (n, d) at the knots to values (p, d) at the points, in the coefficients' dtype."""
    start = jnp.zeros((2, rows.shape[1]), sweeps.take.dtype)

    def forward(r, step):
        carry, take, row = step
        r = times(carry, r) + take[:, None] * row
        return r, r

    def backward(z, step):
        carry, keep, r = step
        z = keep * r + times(carry, z)
        return z, z

    _, r = jax.lax.scan(forward, start, (sweeps.carry_forward, sweeps.take, rows))
    _, z = jax.lax.scan(backward, start, (sweeps.carry_backward, sweeps.keep, r), reverse=True)
    from_lower = jnp.sum(reading.from_lower[:, :, None] * z[reading.lower], axis=1)
    return from_lower + jnp.sum(reading.from_upper[:, :, None] * z[reading.upper], axis=1)
