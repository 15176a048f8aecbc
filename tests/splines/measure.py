"""How far our splines are from the reference, for the tests and for `python -m tests.benchmarks.accuracy`."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcode.codes.matrices import apply_matrix
from jaxcode.splines import fit_and_evaluate
from jaxcode.splines.closed_form import float64_spline_matrix

from . import cases
from .reference import exact_spline, scipy_spline

# What is measured: the matrix as codes multiply it, and the fit applied straight to the data, in either precision.
PROGRAMS = ("matrix float64", "direct float64", "matrix float32", "direct float32")


def bar(program, n):
    """The error that each program must stay within."""
    if program == "matrix float32" and n > 1000:
        # Rounding grows with the terms of a float32 sum; `fit_and_evaluate` has no such sums.
        return 1e-4
    return 1e-9 if program.endswith("float64") else 1e-5


def scipy_is_right(n, smoothing):
    """Where SciPy keeps its digits: it solves equations whose condition number grows like n^4 mu."""
    return smoothing == 0 or (n >= 5 and n**4 * smoothing < 1)


def reference(knots, values, points, smoothing):
    """The best oracle for surviving points."""
    oracle = scipy_spline if scipy_is_right(len(knots), smoothing) else exact_spline
    return oracle(knots, values, points, smoothing)


def errors(n, layout, smoothing, seed=0):
    """Yields (mask's name, {program: error}) for every mask of n knots."""
    rng = np.random.default_rng(seed)
    t = cases.knots(layout, n, rng)
    y, p = cases.data(t, rng), cases.points(t, rng)
    for name, mask in cases.masks(n, rng).items():
        truth = reference(t[mask], y[mask], p, smoothing)
        yield name, {program: cases.worst_error(run(program, t, y, p, smoothing, mask), truth) for program in PROGRAMS}


def run(program, t, y, p, smoothing, mask):
    """One program's values at the points; rows without data hold NaN, which must not be read."""
    path, precision = program.split()
    with jax.enable_x64(precision == "float64"):
        values = jnp.asarray(np.where(mask[:, None], y, np.nan), precision)
        if path == "direct":
            return np.asarray(fit_and_evaluate(t, values, p, smoothing=smoothing, returned=mask))
        matrix = float64_spline_matrix(t, p, smoothing, mask)
        return np.asarray(apply_matrix(matrix, values, jnp.asarray(mask)))
