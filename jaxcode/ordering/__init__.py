r"""Orders a batch so that inputs of one group are near each other.

A code fits a curve through the inputs of a group, and its error grows with how much the model bends along that curve.
In the order of a shuffled batch the curve jumps between unrelated inputs; along a short path through the batch each
input is followed by a similar one. An ordering is any function `(x, num_data) -> permutation` of the batch, of which
each num_data consecutive entries make a group; `coded(f, code, order=...)` applies it and returns results in the order
of the inputs.
"""

from .features import LinearFeatures as LinearFeatures
from .features import sensitivity as sensitivity
from .paths import Greedy as Greedy
from .paths import Metric as Metric
from .paths import Ordering as Ordering
from .paths import greedy as greedy

__all__ = ["Greedy", "LinearFeatures", "Metric", "Ordering", "greedy", "sensitivity"]
