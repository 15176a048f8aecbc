"""Natural cubic smoothing splines in closed form: as matrices, or applied straight to data. Knows nothing of coding."""

from .closed_form import fit_and_evaluate as fit_and_evaluate
from .closed_form import smoother_matrix as smoother_matrix
from .closed_form import spline_matrix as spline_matrix
from .cross_validation import gcv_score as gcv_score
from .cross_validation import gcv_smoothing as gcv_smoothing
