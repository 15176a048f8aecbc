"""Natural cubic smoothing splines in closed form: `Spline` for codes, and functions that apply one to data."""

from .closed_form import fit_and_evaluate as fit_and_evaluate
from .closed_form import smoother_matrix as smoother_matrix
from .closed_form import spline_matrix as spline_matrix
from .interpolant import Spline as Spline

__all__ = ["Spline", "fit_and_evaluate", "smoother_matrix", "spline_matrix"]
