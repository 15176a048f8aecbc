"""Detects faulty workers: those whose answers are not finite, and those whose answers are wrong.

A defence is a function `(code, answers, returned) -> Detection` that can be traced. `coded(f, code, defence=...)`
decodes from the workers that it trusts, as if the others were stragglers. `leave_one_out` needs a batch of many groups;
`SequentialTest` gathers evidence over requests, also of one group each.
"""

from .detection import Defence as Defence
from .detection import Detection as Detection
from .detection import error_locator as error_locator
from .detection import finite as finite
from .detection import leave_one_out as leave_one_out
from .detection import only_finite as only_finite
from .sequential import SequentialTest as SequentialTest
from .sequential import calibrate as calibrate

__all__ = [
    "Defence",
    "Detection",
    "SequentialTest",
    "calibrate",
    "error_locator",
    "finite",
    "leave_one_out",
    "only_finite",
]
