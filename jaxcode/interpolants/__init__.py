"""Curves through data at knots, as linear operators from data to values at points, independent of coding.

`Spline` is the natural cubic smoothing spline of learning-theoretic coded computing; `Berrut` and `FloaterHormann` are
barycentric rational interpolants, `Polynomial` is the least-squares polynomial of a given degree, `NotAKnot` the cubic
B-spline interpolant.
"""

from .abstract import AbstractInterpolant as AbstractInterpolant
from .abstract import dense_linop as dense_linop
from .not_a_knot import NotAKnot as NotAKnot
from .polynomial import Polynomial as Polynomial
from .rational import Berrut as Berrut
from .rational import FloaterHormann as FloaterHormann
from .spline import Spline as Spline

__all__ = ["AbstractInterpolant", "Berrut", "FloaterHormann", "NotAKnot", "Polynomial", "Spline", "dense_linop"]
