"""How far our splines are from the reference, for the tests and for `python -m tests.benchmarks.accuracy`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcode.interpolants.spline import fit_and_evaluate

from . import cases
from .reference import exact_spline, scipy_spline

# What is measured: what the host prepares and what a traced program does, each applied to data of either precision.
PROGRAMS = ("host float64", "traced float64", "host float32", "traced float32")


def error_limit(program):
    """Returns the largest error allowed for a program."""
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
    t, y, p, masks, traced = _setting(n, layout, seed)
    for name, mask in masks.items():
        truth = reference(t[mask], y[mask], p, smoothing)
        found = {}
        for program in PROGRAMS:
            place, precision = program.split()
            with jax.enable_x64(precision == "float64"):
                # Rows without data hold NaN, which must not be read.
                values = jnp.asarray(np.where(mask[:, None], y, np.nan), precision)
                if place == "traced":
                    estimate = traced(values, mask, smoothing)
                else:
                    estimate = fit_and_evaluate(t, values, p, smoothing=smoothing, returned=mask)
                found[program] = cases.worst_error(np.asarray(estimate), truth)
        yield name, found


@functools.cache
def _setting(n, layout, seed):
    rng = np.random.default_rng(seed)
    t = cases.knots(layout, n, rng)
    y, p = cases.data(t, rng), cases.points(t, rng)

    @jax.jit
    def traced(y, mask, smoothing):
        return fit_and_evaluate(t, y, p, smoothing=smoothing, returned=mask)

    return t, y, p, cases.masks(n, rng), traced
