"""The smoothing spline as an interpolant."""

from typing import final

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Inexact

from ..._float64 import in_float64
from ..._pytree import pytree
from ...checks import check_smoothing, static_value
from ...linops import AbstractLinop
from ..abstract import AbstractInterpolant, Vector
from .error import predict_errors
from .linop import spline_linop


@final
@pytree(eq=False)
class Spline(AbstractInterpolant):
    r"""Draws the natural cubic smoothing spline, with a smoothing that is independent of the number of data.

    It minimises :math:`\frac1n \sum_i (u(t_i) - y_i)^2 + \lambda \int u''^2` over the n knots that have data.

    Attributes:
        smoothing: :math:`\lambda \ge 0`, in the knots' unit cubed; 0 interpolates.

    Raises:
        ValueError: If the smoothing is not one number, or is negative or not finite.

    References:
        arXiv 2406.00300, equation 5. Green and Silverman, Nonparametric Regression and Generalized Linear Models, 1994.

    >>> from jaxcode.linops import apply
    >>> curve = Spline().linop(np.array([-1.0, 0.0, 1.0]), np.array([0.5]))
    >>> apply(curve, jnp.array([[1.0], [0.0], [1.0]]))
    Array([[0.3125]], dtype=float32)
    """

    smoothing: ArrayLike = 0.0
    predicts_error = True

    def __post_init__(self):
        check_smoothing("smoothing", self.smoothing)
        static = static_value(self.smoothing)
        if static is not None:
            object.__setattr__(self, "smoothing", float(static))

    @property
    def interpolates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return isinstance(self.smoothing, float) and self.smoothing == 0

    def linop(
        self, knots: Vector, points: Vector, returned: Bool[Array | np.ndarray, "knots"] | None = None
    ) -> AbstractLinop:
        return spline_linop(knots, points, self._total_smoothing(knots, returned), returned)

    def standard_errors(
        self,
        knots: Vector,
        values: Inexact[Array, "knots features"],
        points: Vector,
        returned: Bool[Array | np.ndarray, "knots"],
    ) -> Inexact[Array, "points features"]:
        r"""Predicts standard errors of the curve by the method of `interpolants.spline.error`.

        Args:
            knots: As for `linop`.
            values: Data at the knots, shape (n, features); features share one error model.
            points: As for `linop`.
            returned: As for `linop`.

        Returns:
            Shape (p, features), in the unit of the data: the curve's value :math:`\pm 1.645` standard errors holds the
            truth in nine cases of ten.
        """
        smoothing = 0.0 if self.interpolates else self._total_smoothing(knots, returned)
        return predict_errors(knots, values, points, returned, smoothing)

    def _total_smoothing(self, knots, returned):
        """Converts lambda, for the mean of squares, to mu = n lambda, for their sum over the n knots with data."""
        if returned is None:
            return self.smoothing * float(knots.shape[0])
        if isinstance(returned, np.ndarray):
            return self.smoothing * float(np.count_nonzero(returned))
        return _scale_smoothing(self.smoothing, returned)


@in_float64
def _scale_smoothing(smoothing, returned):
    return smoothing * jnp.sum(returned, dtype=jnp.float64)
