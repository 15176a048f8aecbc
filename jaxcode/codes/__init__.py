"""What workers are sent and how their answers become results: one file per family of codes."""

from .abstract import AbstractCode as AbstractCode
from .abstract import AbstractLinearCode as AbstractLinearCode
from .barycentric import BerrutCode as BerrutCode
from .barycentric import FloaterHormannCode as FloaterHormannCode
from .bspline import BSplineCode as BSplineCode
from .lagrange import LagrangeCode as LagrangeCode
from .replication import ReplicationCode as ReplicationCode
from .replication import UncodedCode as UncodedCode
from .spline import SplineCode as SplineCode
