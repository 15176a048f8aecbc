"""Linear maps of a few rows applied to wide data: dense, gather and blocked operators, and the matmul policy.

An operator takes n rows of data to p rows of results, the same for every feature. What a code or an interpolant
prepares from nodes and a mask is small (n and p are numbers of inputs or workers); the data are wide. So operators are
computed in float64 whatever the data's dtype is, and applied in the data's own.
"""

from .._float64 import in_float64 as in_float64
from .abstract import AbstractLinop as AbstractLinop
from .application import apply as apply
from .application import apply_to_tree as apply_to_tree
from .blocked import Blocked as Blocked
from .dense import Dense as Dense
from .double_single import DoubleSingle as DoubleSingle
from .double_single import split as split
from .gather import Gather as Gather

__all__ = [
    "AbstractLinop",
    "Blocked",
    "Dense",
    "DoubleSingle",
    "Gather",
    "apply",
    "apply_to_tree",
    "in_float64",
    "split",
]
