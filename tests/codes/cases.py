"""The table that the tests of codes share: codes with their node layouts, and which workers returned."""

import functools

import jax
import numpy as np
import pytest

import jaxcode as jc
from jaxcode import interpolants, nodes

from .nearest_code import NearestCode

NUM_DATA, NUM_WORKERS = 5, 12

_sizes = (NUM_DATA, NUM_WORKERS)
LAYOUTS = {
    "chebyshev": nodes.chebyshev(*_sizes),
    "systematic": nodes.systematic(*_sizes),
    "repeated": nodes.repeated(*_sizes),
    "mixed": nodes.mixed(*_sizes, num_between=3),
}
FAMILIES = {
    "spline": jc.SplineCode,
    "berrut": jc.BerrutCode,
    "floater-hormann-3": functools.partial(jc.FloaterHormannCode, degree=3),
    "lagrange-2": functools.partial(jc.LagrangeCode, degree=2),
    "bspline": jc.BSplineCode,
}


def _irregular_nodes():
    """Nodes a user might choose: irregular, some workers outside the data's range and outside [-1, 1]."""
    rng = np.random.default_rng(1)
    return [reach * (nodes.uniform(n) + rng.uniform(-0.6, 0.6, n) / n) for reach, n in ((0.8, 5), (1.2, 12))]


CODES = {
    f"{family}-{layout}": construct(placed.data, placed.workers)
    for family, construct in FAMILIES.items()
    for layout, placed in LAYOUTS.items()
} | {
    "spline-irregular": jc.SplineCode(*_irregular_nodes()),
    "spline-smoothed": jc.SplineCode.chebyshev(*_sizes, encoder_smoothing=1e-3, decoder_smoothing=1e-2),
    "spline-smoothed-mixed": jc.SplineCode.mixed(*_sizes, 3, encoder_smoothing=1e-3, decoder_smoothing=1e-2),
    "floater-hormann-0": jc.FloaterHormannCode.chebyshev(*_sizes, degree=0),
    "bspline-lagrange": jc.BSplineCode.chebyshev(*_sizes, encoder=interpolants.Polynomial()),
    "spline-then-berrut": jc.InterpolatingCode(LAYOUTS["systematic"], interpolants.Spline(), interpolants.Berrut()),
    "replication": jc.ReplicationCode(*_sizes),
    "uncoded": jc.UncodedCode(NUM_DATA),
    "outside": NearestCode(*_sizes),
}
# One of each program: codes that differ only in nodes and smoothing share what is compiled.
PROGRAMS = [
    "spline-smoothed",
    "berrut-chebyshev",
    "floater-hormann-3-chebyshev",
    "lagrange-2-chebyshev",
    "bspline-repeated",
    "bspline-lagrange",
    "replication",
    "uncoded",
    "outside",
]
MOVES_ROWS = ["replication", "uncoded", "outside"]
INTERPOLATING = [name for name in CODES if name not in MOVES_ROWS]
MERGES_SITES = [name for name in INTERPOLATING if name.endswith(("-repeated", "-mixed"))]
ENCODES_LINES = [name for name in INTERPOLATING if not name.startswith(("berrut", "floater-hormann-0", "bspline"))]
DECODES_LINES = [name for name in INTERPOLATING if "berrut" not in name and name != "floater-hormann-0"]

_returned = {
    "all": lambda n: np.ones(n, bool),
    "random-third-missing": lambda n: np.random.default_rng(3).permutation(n) >= n // 3,
    "first-run-missing": lambda n: np.arange(n) >= n // 3,
    "last-run-missing": lambda n: np.arange(n) < n - n // 3,
    "both-ends-missing": lambda n: (np.arange(n) > 0) & (np.arange(n) < n - 1),
    "alternating": lambda n: np.arange(n) % 2 == 0,
    "two-adjacent": lambda n: np.isin(np.arange(n), [n // 2 - 1, n // 2]),
    "two-far-apart": lambda n: np.isin(np.arange(n), [0, n - 1]),
}
MASKS = list(_returned)

each_code = pytest.mark.parametrize("name", CODES)
each_program = pytest.mark.parametrize("name", PROGRAMS)
each_mask = pytest.mark.parametrize("mask", MASKS)


def returned_of(mask, name):
    """Which workers of a code returned."""
    return _returned[mask](CODES[name].num_workers)


def all_masks(name):
    """Every mask of the table for a code, stacked."""
    return np.stack([returned_of(mask, name) for mask in MASKS])


def in_x64(function):
    """Compiles a function of (code, ...) with x64 on, where nodes given as arguments keep their digits."""
    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(*args):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, compiled(*args))

    return call


@in_x64
def encoder_matrix(code):
    return code.encoder_matrix()


@in_x64
def decoder_matrix(code, returned):
    return code.decoder_matrix(returned)


def sites(code, returned):
    """How many distinct nodes the workers that returned sit at."""
    return len(np.unique(code.nodes.workers[returned]))


def normal(*shape, seed=0, dtype=np.float32):
    return np.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_near(actual, expected, scale, digits):
    """Compares in float64; errors are measured against a scale, the size of the terms that were summed."""
    assert np.shape(actual) == np.shape(expected)
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    bound = 10.0**-digits * np.maximum(np.nan_to_num(np.max(np.abs(scale), initial=0)), 1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)
