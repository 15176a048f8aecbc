"""The guide's interpolant against NumPy, and the guide itself against the file that is tested."""

import inspect
import pathlib
import textwrap

import jax
import numpy as np

from jaxcode.interpolants import AbstractInterpolant

from . import linear
from .cases import KNOTS, MASKS, POINTS, each_mask, each_way, matrix


@each_mask
@each_way
def test_it_is_numpys_interp(mask, way):
    data = np.random.default_rng(2).normal(size=len(KNOTS))
    returned = MASKS[mask]
    with jax.enable_x64(True):
        results = matrix(linear.Linear(), KNOTS, POINTS, returned, way) @ data
    np.testing.assert_allclose(results, np.interp(POINTS, KNOTS[returned], data[returned]), atol=1e-12)


def test_the_guide_shows_this_file():
    """All of it but the module's docstring."""
    source = pathlib.Path(linear.__file__).read_text()
    example = source.split('"""', 2)[2].strip().replace('"""', "'''")
    guide = inspect.getdoc(AbstractInterpolant)
    block = textwrap.dedent(guide.split(".. code-block:: python\n", 1)[1].split("\nAttributes:", 1)[0]).strip()
    assert block == example
    assert len(example.splitlines()) < 40
