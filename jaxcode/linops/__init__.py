"""Linear operators from a few rows to a few rows of wide data: dense, gather and blocked, and the matmul policy.

An operator maps n rows of data to p rows of results, in the same way for every feature. The operator that a code or an
interpolant prepares from nodes and a mask is small (n and p are numbers of inputs or workers); the data are wide. So
operators are computed in float64 whatever the data's dtype is, and applied in the data's dtype.
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
