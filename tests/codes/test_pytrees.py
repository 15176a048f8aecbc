"""Codes are pytrees: what JAX and Flax do with leaves and structures works on them."""

import jax
import numpy as np
import pytest

from jaxcode import BSplineCode, SplineCode
from jaxcode.interpolants import Berrut, Polynomial

from .cases import CODES, each_code


@each_code
def test_flattens_and_back(name):
    code = CODES[name]
    leaves, structure = jax.tree.flatten(code)
    for copy in (jax.tree.unflatten(structure, leaves), jax.tree.map(lambda leaf: leaf, code)):
        assert type(copy) is type(code)
        assert jax.tree.structure(copy) == structure
        assert (copy.num_data, copy.num_workers) == (code.num_data, code.num_workers)
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(copy), leaves, strict=True))


@each_code
@pytest.mark.parametrize("stand_in", [None, object(), "x"], ids=["none", "object", "string"])
def test_leaves_may_stand_for_arrays(name, stand_in):
    structure = jax.tree.structure(CODES[name])
    filled = jax.tree.unflatten(structure, [stand_in] * structure.num_leaves)
    assert all(leaf is stand_in for leaf in jax.tree.leaves(filled, is_leaf=lambda leaf: leaf is None))


def test_settings_are_static():
    structures = [jax.tree.structure(CODES[name]) for name in ("floater-hormann-0", "floater-hormann-3-chebyshev")]
    assert structures[0] != structures[1]
    berrut, lagrange = (BSplineCode.chebyshev(3, 6, encoder=encoder) for encoder in (Berrut(), Polynomial()))
    assert jax.tree.structure(berrut) != jax.tree.structure(lagrange)


def test_nodes_keep_float64_whatever_x64_mode():
    code = SplineCode.chebyshev(5, 12)
    assert code.nodes.data.dtype == code.nodes.workers.dtype == np.float64
    assert isinstance(code.nodes.data, np.ndarray)
