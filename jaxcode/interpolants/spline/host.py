r"""Forms the smoothing spline's matrix on the host from static arguments, without compilation.

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
from scipy.linalg.lapack import dgbsv, dptsv  # pyright: ignore[reportAttributeAccessIssue]

from ..abstract import SAME_SITE, span_of


def host_spline_matrix(
    knots: Float[np.ndarray, "knots"],
    points: Float[np.ndarray, "points"],
    weights: Float[np.ndarray, "knots"],
    smoothing: float,
) -> Float[np.ndarray, "points knots"]:
    r"""Forms the matrix from values at the knots to the smoothing spline's values at the points.

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
    # Gaps are scaled to a sum of about 1, for which LAPACK's choice of pivots loses no digits. Differences are taken
    # before scaling, because scaling would round places far from zero.
    unit = float(span_of(knots))
    smoothing = smoothing / unit / unit / unit
    t, w = knots[live], weights[live]
    gap = (t[1:] - t[:-1]) / unit
    if gap.min() > SAME_SITE:
        matrix[:, live] = fit_matrix(gap, evaluation_matrix(t, points, unit), w, smoothing)
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
        site_matrix = fit_matrix(np.diff(t) / unit, evaluation_matrix(t, points, unit), total, smoothing)
        matrix[:, live] = np.repeat(site_matrix, count, axis=1) * share
    return matrix


def fit_matrix(
    gap: Float[np.ndarray, "gaps"],
    evaluation: Float[np.ndarray, "evaluations unknowns"],
    weights: Float[np.ndarray, "sites"],
    smoothing: float,
) -> Float[np.ndarray, "evaluations sites"]:
    r"""Forms the matrix from values at sites to combinations of the fit's unknowns :math:`g_1, \gamma_1, g_2, \ldots`.

    Args:
        gap: Distances between neighbouring sites, positive, one or more, with a sum of about 1.
        evaluation: Coefficients of the unknowns, two for each site, in each combination; see `evaluation_matrix`.
        weights: Positive.
        smoothing: :math:`\mu \ge 0`.

    Returns:
        The matrix, float64.

    Raises:
        ArithmeticError: If the equations are singular.
    """
    m, inverse_gap = len(gap) + 1, 1 / gap
    if smoothing == 0 and m > 3:
        return _interpolation_matrix(gap, inverse_gap, evaluation)
    # The transposed equations in LAPACK's band storage, 20 numbers for each site: ten for the equation of its value,
    # ten for that of its second derivative. The diagonal's coefficient has index 6, that of the unknown i further on
    # index 6 + i; the first three are LAPACK's own.
    bands = np.zeros((m, 20))
    inner = np.empty((m - 2, 4))
    inner[:, 0], inner[:, 1] = inverse_gap[:-1], inverse_gap[1:]
    inner[:, 2], inner[:, 3] = gap[:-1], gap[1:]
    np.matmul(inner, _STIFFNESS * smoothing + _CURVATURE, out=bands[1:-1])
    bands[:, 6] = weights
    bands[0, 16] = bands[-1, 16] = 1
    bands[0, 9], bands[-1, 5] = smoothing * inverse_gap[0], smoothing * inverse_gap[-1]
    _, _, solution, failed = dgbsv(3, 3, bands.reshape(-1, 10).T, evaluation.T, overwrite_ab=1, overwrite_b=1)
    _check_regular(failed, gap)
    return solution[::2].T * weights


def _interpolation_matrix(gap, inverse_gap, evaluation):
    """Forms the matrix without smoothing: then g = y, and R, which is diagonally dominant, gives the curvatures."""
    diagonal, off_diagonal = (gap[:-1] + gap[1:]) / 3, gap[1:-1] / 6
    _, _, solution, failed = dptsv(diagonal, off_diagonal, evaluation[:, 3:-1:2].T, overwrite_d=1, overwrite_e=1)
    _check_regular(failed, gap)
    # The product with Q^T, of second differences.
    lower_term, upper_term = solution.T * inverse_gap[:-1], solution.T * inverse_gap[1:]
    matrix = evaluation[:, ::2].copy()
    matrix[:, :-2] += lower_term
    matrix[:, 1:-1] -= lower_term + upper_term
    matrix[:, 2:] += upper_term
    return matrix


def _check_regular(failed_row, gap):
    if failed_row:
        raise ArithmeticError(f"the spline's equations are singular at row {failed_row}; gaps between knots are {gap}")


def _form_table(entries):
    """Forms the matrix from (1 / gap before, 1 / gap after, gap before, gap after) to a site's row of band storage."""
    table = np.zeros((4, 20))
    for quantity, index, factor in entries:
        table[quantity, index] = factor
    return table


# An inner site's equations: mu (Q gamma)_j, to which w_j g_j is added, and (Q^T g)_j - (R gamma)_j.
_STIFFNESS = _form_table([(0, 5, 1), (0, 7, -1), (1, 7, -1), (1, 9, 1)])
_CURVATURE = _form_table(
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


def evaluation_matrix(
    sites: Float[np.ndarray, "sites"], points: Float[np.ndarray, "points"], unit: float
) -> Float[np.ndarray, "points unknowns"]:
    r"""Forms the coefficients with which the curve's value at each point combines the unknowns, two for each site.

    Between sites with values :math:`g_0, g_1` and second derivatives :math:`\gamma_0, \gamma_1`, a distance h apart in
    the given unit, and with :math:`a = 1 - b` the point's barycentric coordinates, the value is (Green and Silverman
    1994, section 2.1)

    .. math::
        a g_0 + b g_1 - \tfrac{h^2}{6} a b \big( (1 + a) \gamma_0 + (1 + b) \gamma_1 \big).

    Beyond an end, whose own second derivative is zero, it is the straight line that coordinates clipped to [0, 1] give
    in the products above: :math:`a \, \bar b (1 + \bar a) \gamma_0 + b \, \bar a (1 + \bar b) \gamma_1`.
    """
    gap = sites[1:] - sites[:-1]
    lower = sites[1:-1].searchsorted(points, side="right")
    width = gap[lower]
    values = np.empty((2, len(points)))
    np.divide(points - sites[lower], width, out=values[1])
    np.subtract(1, values[1], out=values[0])
    clipped = np.minimum(np.maximum(values, 0), 1)
    curvatures = (width / unit) ** 2 / -6 * values * (clipped[::-1] * (1 + clipped))
    evaluation = np.zeros((len(points), 2 * len(sites)))
    flat = evaluation.reshape(-1)
    first = 2 * lower + np.arange(0, evaluation.size, evaluation.shape[1])
    flat[first], flat[first + 1], flat[first + 2], flat[first + 3] = values[0], curvatures[0], values[1], curvatures[1]
    return evaluation
