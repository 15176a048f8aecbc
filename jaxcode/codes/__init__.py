"""Codes: how inputs become coded inputs for workers, and how their answers become results.

A code encodes K inputs into N coded inputs and decodes K results from the answers that came. `InterpolatingCode` is
nodes x encoder x decoder; the named codes of the literature are constructors of it. `AbstractCode` describes how to
write another.
"""

from .abstract import AbstractCode as AbstractCode
from .interpolating import InterpolatingCode as InterpolatingCode
from .kernel import KernelCode as KernelCode
from .named import BerrutCode as BerrutCode
from .named import BSplineCode as BSplineCode
from .named import FloaterHormannCode as FloaterHormannCode
from .named import LagrangeCode as LagrangeCode
from .named import SplineCode as SplineCode
from .plan import Plan as Plan
from .plan import Prior as Prior
from .replication import ReplicationCode as ReplicationCode
from .replication import UncodedCode as UncodedCode

__all__ = [
    "AbstractCode",
    "BSplineCode",
    "BerrutCode",
    "FloaterHormannCode",
    "InterpolatingCode",
    "KernelCode",
    "LagrangeCode",
    "Plan",
    "Prior",
    "ReplicationCode",
    "SplineCode",
    "UncodedCode",
]
