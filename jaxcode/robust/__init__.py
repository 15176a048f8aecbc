"""Detects faulty workers: those whose answers are not finite, and those whose answers are wrong.

A defence is a function `(code, answers, returned) -> Detection` that can be traced. `coded(f, code, defence=...)`
decodes from the workers that it trusts, as if the flagged ones were stragglers.
"""

from .detection import Defence as Defence
from .detection import Detection as Detection
from .detection import error_locator as error_locator
from .detection import finite as finite
from .detection import leave_one_out as leave_one_out
from .detection import only_finite as only_finite

__all__ = ["Defence", "Detection", "error_locator", "finite", "leave_one_out", "only_finite"]
