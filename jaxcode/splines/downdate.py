r"""The smoothing spline without some of its data, from the one with all of them: by filling in what is missing.

With D the matrix from data at all knots, each of weight one, to values at points, the fit to all data leaves residuals
:math:`\mu C y`, :math:`C = Q (R + \mu Q^T Q)^{-1} Q^T` (`jaxcode.splines.banded` says what Q and R are). Data that lie
on the curve through the others leave none: those of the knots M follow from those of the rest R as
:math:`y_M = -C_{MM}^{-1} C_{MR} \, y_R`, for every :math:`\mu \ge 0`, and the spline without them is

.. math::
    D_R - D_M C_{MM}^{-1} C_{MR}.

Where D and C are at hand this takes a few products of small matrices.

References:
    The lemma of leaving out one, here for several: Craven and Wahba, Numerische Mathematik 31 (1979), section 3.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.linalg.blas import dgemm  # pyright: ignore[reportAttributeAccessIssue]
from scipy.linalg.lapack import dposv  # pyright: ignore[reportAttributeAccessIssue]

from .banded import fit_matrix, in_units_of_span, reading_matrix

# With more, what is prepared for one smoothing after another, as a code's grows with the number of answers, would take
# too long and too much room.
MOST_KNOTS = 128
MOST_PREPARED = 128
# Digits are lost as neighbours missing in a row grow in number, and where gaps between knots differ much. Within these
# bounds the matrix is right to 1e-9 of its largest row, and to 2e-11 for Chebyshev, systematic and even nodes.
LONGEST_RUN = 6
WIDEST_TO_NEXT = 5.0
WIDEST_TO_NARROWEST = 100.0
# Of one at a knot, what the curve leaves of it there; less is left by too few digits.
LEAST_RESIDUAL = 1e-3


class _Whole(NamedTuple):
    """The spline with all data.

    Attributes:
        matrix: D, shape (p, n).
        residuals: C, in any unit, shape (n, n).
    """

    matrix: np.ndarray
    residuals: np.ndarray


def downdated_matrix(
    knots: Float[np.ndarray, "knots"],
    points: Float[np.ndarray, "points"],
    returned: Bool[np.ndarray, "knots"],
    smoothing: float,
) -> Float[np.ndarray, "points knots"] | None:
    r"""The matrix from values at the knots that have data to the smoothing spline's values at the points.

    The first call for these knots, points and smoothing prepares what others share.

    Args:
        knots: Ascending.
        points: In any order.
        returned: Which knots have data.
        smoothing: :math:`\mu \ge 0`.

    Returns:
        The matrix, float64, zero but for rounding in columns of knots without data; None where that would cost digits
        or time: with many neighbours missing, half of the data or none, very many knots, or uneven ones.
    """
    n, missing = len(knots), (~returned).nonzero()[0]
    if n > MOST_KNOTS or not 0 < 2 * len(missing) < n or bytes(LONGEST_RUN + 1) in returned.tobytes():
        return None
    whole = _prepared(knots.tobytes(), points.tobytes(), smoothing)
    if whole is None:
        return None
    # A call with a fresh mask waits for this, for each of these few steps about as long as for any other. Transposed,
    # arrays are in LAPACK's order as they are.
    rows = whole.residuals.take(missing, axis=0)
    among, to_points = rows.take(missing, axis=1), whole.matrix.take(missing, axis=1)
    _, fill, failed = dposv(among.T, to_points.T, overwrite_a=1, overwrite_b=1)
    return None if failed else dgemm(-1.0, rows.T, fill, 1.0, whole.matrix.T).T


@functools.lru_cache(maxsize=MOST_PREPARED)
def _prepared(knots: bytes, points: bytes, smoothing: float) -> _Whole | None:
    """None where knots lie too unevenly, or the curve leaves nothing of some data."""
    t, p, smoothing = in_units_of_span(np.frombuffer(knots, np.float64), np.frombuffer(points, np.float64), smoothing)
    n, gap = len(t), np.diff(t)
    wider, narrower = np.maximum(gap[1:], gap[:-1]), np.minimum(gap[1:], gap[:-1])
    if (wider > WIDEST_TO_NEXT * narrower).any() or not gap.max() <= WIDEST_TO_NARROWEST * gap.min():
        return None
    unknowns = np.eye(2 * n)
    reading = np.concatenate([reading_matrix(t, p), unknowns[::2], unknowns[1::2]])
    matrix, values, bends = np.split(fit_matrix(t, reading, np.ones(n), smoothing), [len(p), len(p) + n])
    residuals = np.eye(n) - values
    if residuals.diagonal().min() < LEAST_RESIDUAL:
        # Their digits are in the second derivatives: C is Q times these.
        residuals = np.diff(np.diff(bends, axis=0) / gap[:, None], axis=0, prepend=0, append=0)
    if not residuals.diagonal().min() > 0:
        return None
    # Symmetric but for rounding.
    return _Whole(matrix, (residuals + residuals.T) / 2)
