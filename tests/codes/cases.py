"""The table that the tests of codes share: codes with their node layouts, and which workers returned."""

import functools

import jax
import numpy as np
import pytest

from jaxcode import (
    BerrutCode,
    BSplineCode,
    FloaterHormannCode,
    LagrangeCode,
    ReplicationCode,
    SplineCode,
    UncodedCode,
    nodes,
)

NUM_DATA, NUM_WORKERS = 5, 12


def _own_nodes():
    """Nodes a user might choose: irregular, some workers outside the data's range and outside [-1, 1]."""
    rng = np.random.default_rng(1)
    return [reach * (nodes.uniform(n) + rng.uniform(-0.6, 0.6, n) / n) for reach, n in ((0.8, 5), (1.2, 12))]


_sizes = (NUM_DATA, NUM_WORKERS)
_alpha = nodes.chebyshev_first(NUM_DATA)
_systematic = (_alpha, nodes.systematic(_alpha, NUM_WORKERS))

CODES = {
    "spline-chebyshev": SplineCode.chebyshev(*_sizes),
    "spline-systematic": SplineCode.systematic(*_sizes),
    "spline-repeated": SplineCode.repeated(*_sizes),
    "spline-own": SplineCode(*_own_nodes()),
    "spline-smoothed": SplineCode.chebyshev(*_sizes, encoder_smoothing=1e-3, decoder_smoothing=1e-2),
    "berrut": BerrutCode.chebyshev(*_sizes),
    "berrut-systematic": BerrutCode(*_systematic),
    "floater-hormann-0": FloaterHormannCode.chebyshev(*_sizes, degree=0),
    "floater-hormann-3": FloaterHormannCode.chebyshev(*_sizes, degree=3),
    "floater-hormann-3-systematic": FloaterHormannCode(*_systematic, degree=3),
    "lagrange-2": LagrangeCode.chebyshev(*_sizes, degree=2),
    "bspline-berrut": BSplineCode.chebyshev(*_sizes, encoder="berrut"),
    "bspline-lagrange": BSplineCode.chebyshev(*_sizes, encoder="lagrange"),
    "replication": ReplicationCode(*_sizes),
    "uncoded": UncodedCode(NUM_DATA),
}
# One of each program: codes that differ only in nodes and smoothing share what is compiled.
PROGRAMS = [
    "spline-smoothed",
    "berrut",
    "floater-hormann-3",
    "lagrange-2",
    "bspline-berrut",
    "bspline-lagrange",
    "replication",
    "uncoded",
]
INTERPOLATING = [name for name in CODES if name not in ("replication", "uncoded")]
ENCODES_LINES = [name for name in INTERPOLATING if "berrut" not in name and not name.endswith("-0")]
DECODES_LINES = [*ENCODES_LINES, "bspline-berrut"]

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


def normal(*shape, seed=0, dtype=np.float32):
    return np.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_near(actual, expected, scale, digits):
    """Compares in float64; errors are measured against a scale, the size of the terms that were summed."""
    assert np.shape(actual) == np.shape(expected)
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    bound = 10.0**-digits * np.maximum(np.nan_to_num(np.max(np.abs(scale), initial=0)), 1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)
