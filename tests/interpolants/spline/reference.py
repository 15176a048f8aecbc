"""Reference splines that this project did not write, or that are too slow and exact to be wrong.

SciPy's `make_smoothing_spline` is the oracle wherever it is right: it solves the equations of Reinsch in float64, whose
condition grows like n^4 mu, and of many close knots with much smoothing nothing is left. There the same equations in
60-digit arithmetic are the oracle.
"""

import mpmath
import numpy as np
from scipy.interpolate import CubicSpline, make_smoothing_spline


def scipy_spline(knots, values, points, smoothing):
    """SciPy's natural cubic (smoothing) spline, continued outside its knots by straight lines; values (n, d)."""
    if len(knots) == 2:
        slope = (values[1] - values[0]) / (knots[1] - knots[0])
        return values[0] + (points[:, None] - knots[0]) * slope
    if smoothing == 0 or len(knots) < 5:
        assert smoothing == 0, "make_smoothing_spline needs five points"
        curve = CubicSpline(knots, values, bc_type="natural")
    else:
        curve = make_smoothing_spline(knots, values, lam=smoothing)
    return continued(curve, knots, points)


def continued(curve, knots, points):
    """A curve at points; outside the knots the straight line of its end's slope."""
    nearest = np.clip(points, knots[0], knots[-1])
    slope = curve.derivative()(nearest) if hasattr(curve, "derivative") else curve(nearest, 1)
    return curve(nearest) + (points - nearest)[:, None] * slope


def exact_spline(knots, values, points, smoothing, digits=60):
    """The natural cubic smoothing spline by Reinsch's equations in `digits`-digit arithmetic; values (n, d)."""
    with mpmath.workdps(digits):
        t = [mpmath.mpf(float(v)) for v in knots]
        n, inner = len(t), len(t) - 2
        mu = mpmath.mpf(float(smoothing))
        h = [t[i + 1] - t[i] for i in range(n - 1)]
        q = [(1 / h[j], -1 / h[j] - 1 / h[j + 1], 1 / h[j + 1]) for j in range(inner)]
        factors = _pentadiagonal_factors(h, q, mu)
        columns = []
        for column in np.asarray(values, float).T:
            y = [mpmath.mpf(float(v)) for v in column]
            right = [sum(q[j][k] * y[j + k] for k in range(3)) for j in range(inner)]
            curvature = _pentadiagonal_solve(factors, right)
            g = list(y)
            for j in range(inner):
                for k in range(3):
                    g[j + k] -= mu * q[j][k] * curvature[j]
            columns.append([_read(t, h, g, [mpmath.mpf(0), *curvature, mpmath.mpf(0)], p) for p in points])
        return np.array(columns, float).T


def _pentadiagonal_factors(h, q, mu):
    """The factors L D L^T of R + mu Q^T Q."""
    n = len(q)
    diagonal, first, second = [], [], []
    for i in range(n):
        d = (h[i] + h[i + 1]) / 3 + mu * sum(v * v for v in q[i])
        d -= first[i - 1] ** 2 * diagonal[i - 1] if i > 0 else 0
        d -= second[i - 2] ** 2 * diagonal[i - 2] if i > 1 else 0
        diagonal.append(d)
        if i < n - 1:
            e = h[i + 1] / 6 + mu * (q[i][1] * q[i + 1][0] + q[i][2] * q[i + 1][1])
            e -= second[i - 1] * first[i - 1] * diagonal[i - 1] if i > 0 else 0
            first.append(e / d)
        if i < n - 2:
            second.append(mu * q[i][2] * q[i + 2][0] / d)
    return diagonal, first, second


def _pentadiagonal_solve(factors, right):
    diagonal, first, second = factors
    n = len(diagonal)
    x = list(right)
    for i in range(n):
        x[i] -= first[i - 1] * x[i - 1] if i > 0 else 0
        x[i] -= second[i - 2] * x[i - 2] if i > 1 else 0
    x = [x[i] / diagonal[i] for i in range(n)]
    for i in reversed(range(n)):
        x[i] -= first[i] * x[i + 1] if i < n - 1 else 0
        x[i] -= second[i] * x[i + 2] if i < n - 2 else 0
    return x


def _read(t, h, g, curvature, point):
    last = len(t) - 2
    i = min(max(int(np.searchsorted([float(v) for v in t], point, side="right")) - 1, 0), last)
    b = (mpmath.mpf(float(point)) - t[i]) / h[i]
    a = 1 - b
    if b < 0:
        slope = (g[i + 1] - g[i]) / h[i] - h[i] * curvature[i + 1] / 6
        return g[i] + b * h[i] * slope
    if b > 1:
        slope = (g[i + 1] - g[i]) / h[i] + h[i] * curvature[i] / 6
        return g[i + 1] + (b - 1) * h[i] * slope
    return a * g[i] + b * g[i + 1] + ((a**3 - a) * curvature[i] + (b**3 - b) * curvature[i + 1]) * h[i] ** 2 / 6
