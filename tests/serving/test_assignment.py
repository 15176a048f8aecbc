"""Tests the order in which coded inputs are assigned."""

import numpy as np
import pytest

from jaxcode import ReplicationCode, SplineCode
from jaxcode.serving._assignment import assignment_order


@pytest.mark.parametrize("layout", ["systematic", "repeated", "chebyshev"])
def test_the_most_informative_coded_inputs_are_assigned_first(layout):
    code = getattr(SplineCode, layout)(6, 15)
    order = assignment_order(code)
    assert sorted(order) == list(range(15))
    if layout == "chebyshev":
        assert sorted(order[:2]) == [0, 14]
    else:
        np.testing.assert_allclose(np.sort(code.nodes.workers[order[:6]]), code.nodes.data)
    # Whichever come last, the first ones are spread over all nodes.
    assert np.diff(np.sort(np.arccos(code.nodes.workers[order[:8]] / code.nodes.workers[-1]))).max() < 1
    assert assignment_order(ReplicationCode(3, 7)) == list(range(7))
