r"""The smoothing spline's matrix on the host, where knots, weights and smoothing are known: nothing to compile.

With values :math:`g_j` and second derivatives :math:`\gamma_j` at the m sites that have data, a distance :math:`h_j`
apart, the minimiser satisfies (Green and Silverman 1994, section 2.1)

.. math::
    w_j g_j + \mu (Q \gamma)_j = w_j y_j, \qquad (Q^T g)_j - (R \gamma)_j = 0, \qquad \gamma_1 = \gamma_m = 0.

In the order :math:`g_1, \gamma_1, g_2, \gamma_2, \ldots` this is a matrix with three diagonals on either side, which
LAPACK factors with pivoting in time proportional to m, whatever the smoothing, zero included. A curve's value at a
point is a combination of four of the unknowns, so rows of the spline's matrix solve the transposed equations.

References:
    Green and Silverman, Nonparametric Regression and Generalized Linear Models (1994).
"""

import numpy as np
from jaxtyping import Float
from scipy.linalg.lapack import dgbsv  # pyright: ignore[reportAttributeAccessIssue]

from ..abstract import SAME_SITE


def banded_matrix(
    knots: Float[np.ndarray, "knots"],
    points: Float[np.ndarray, "points"],
    weights: Float[np.ndarray, "knots"],
    smoothing: float,
) -> Float[np.ndarray, "points knots"]:
    r"""The matrix from values at the knots to the smoothing spline's values at the points.

    Args:
        knots: Ascending; neighbours may be equal.
        points: In any order.
        weights: Not negative; zero leaves the knot out.
        smoothing: :math:`\mu \ge 0`.

    Returns:
        The matrix, float64; NaN with data at fewer than two knots.
    """
    matrix = np.zeros((len(points), len(knots)))
    live = weights.nonzero()[0]
    if len(live) < 2:
        matrix[:] = np.nan
        return matrix
    knots, points, smoothing = in_units_of_span(knots, points, smoothing)
    t, w = knots[live], weights[live]
    gap = t[1:] - t[:-1]
    if gap.min() > SAME_SITE:
        matrix[:, live] = fit_matrix(t, reading_matrix(t, points), w, smoothing)
        return matrix
    # Knots at one place count as one, whose value is their weighted mean.
    first = np.concatenate([[True], gap > SAME_SITE]).nonzero()[0]
    total = np.add.reduceat(w, first)
    count = np.diff(first, append=len(t))
    share = w / np.repeat(total, count)
    if len(first) == 1:
        matrix[:, live] = share
    else:
        t = t[first]
        by_site = fit_matrix(t, reading_matrix(t, points), total, smoothing)
        matrix[:, live] = np.repeat(by_site, count, axis=1) * share
    return matrix


def in_units_of_span(
    knots: Float[np.ndarray, "knots"], points: Float[np.ndarray, "points"], smoothing: float
) -> tuple[Float[np.ndarray, "knots"], Float[np.ndarray, "points"], float]:
    """The same spline in a unit in which LAPACK's choice of pivots keeps its digits: the knots' span is one."""
    span = float(knots[-1] - knots[0])
    if span == 0:
        return knots, points, smoothing
    return (knots - knots[0]) / span, (points - knots[0]) / span, smoothing / span / span / span


def fit_matrix(
    sites: Float[np.ndarray, "sites"],
    reading: Float[np.ndarray, "readings unknowns"],
    weights: Float[np.ndarray, "sites"],
    smoothing: float,
) -> Float[np.ndarray, "readings sites"]:
    r"""From values at sites to what is read of the unknowns :math:`g_1, \gamma_1, g_2, \gamma_2, \ldots` of the fit.

    Args:
        sites: Strictly ascending, two or more, of a span of about one.
        reading: How much of each unknown, two a site, every reading takes.
        weights: Positive.
        smoothing: :math:`\mu \ge 0`.

    Raises:
        ArithmeticError: If the equations are singular.
    """
    gap = sites[1:] - sites[:-1]
    m, over = len(sites), 1 / gap
    # The transposed equations in LAPACK's order: an equation's coefficient of the unknown i places after it stands in
    # place 6 + i; the first three are LAPACK's. Ten for the equation of a value, ten for that of a second derivative.
    bands = np.zeros((m, 20))
    around = np.empty((m - 2, 4))
    around[:, 0], around[:, 1] = over[:-1], over[1:]
    around[:, 2], around[:, 3] = gap[:-1], gap[1:]
    np.matmul(around, _STIFFNESS * smoothing + _CURVATURE, out=bands[1:-1])
    bands[:, 6] = weights
    bands[0, 16] = bands[-1, 16] = 1
    bands[0, 9], bands[-1, 5] = smoothing * over[0], smoothing * over[-1]
    _, _, solution, failed = dgbsv(3, 3, bands.reshape(-1, 10).T, reading.T, overwrite_ab=1, overwrite_b=1)
    if failed:
        raise ArithmeticError(f"the spline's equations are singular at row {failed} of {2 * m}; knots are {sites}")
    return solution[::2].T * weights


def _coefficients(entries):
    """From (gap before)^-1, (gap after)^-1, gap before, gap after to places in the equations."""
    table = np.zeros((4, 20))
    for row, place, factor in entries:
        table[row, place] = factor
    return table


# Of an inner site: mu (Q gamma)_j beside w_j g_j, and (Q^T g)_j - (R gamma)_j.
_STIFFNESS = _coefficients([(0, 5, 1), (0, 7, -1), (1, 7, -1), (1, 9, 1)])
_CURVATURE = _coefficients(
    [
        (0, 13, 1),
        (0, 15, -1),
        (1, 15, -1),
        (1, 17, 1),
        (2, 14, -1 / 6),
        (2, 16, -1 / 3),
        (3, 16, -1 / 3),
        (3, 18, -1 / 6),
    ]
)


def reading_matrix(
    t: Float[np.ndarray, "sites"], points: Float[np.ndarray, "points"]
) -> Float[np.ndarray, "points unknowns"]:
    """What each point's value takes of the unknowns, two at each of the sites t."""
    gap = t[1:] - t[:-1]
    lower = t[1:-1].searchsorted(points, side="right")
    width = gap[lower]
    b = (points - t[lower]) / width
    a = 1 - b
    # a^3 - a = -a b (1 + a), and for b likewise.
    square = width**2 / 6
    both = a * b
    bend = square * both
    of_a, of_b = -bend * (1 + a), -bend * (1 + b)
    outside = both < 0
    if outside.any():
        # The end's own second derivative is zero, and the inner site's sets the slope.
        of_a = np.where(outside, square * np.maximum(-a, 0), of_a)
        of_b = np.where(outside, square * np.maximum(-b, 0), of_b)
    reading = np.zeros((len(points), 2 * len(t)))
    flat = reading.reshape(-1)
    at = 2 * lower + np.arange(0, reading.size, reading.shape[1])
    flat[at], flat[at + 1], flat[at + 2], flat[at + 3] = a, of_a, b, of_b
    return reading
