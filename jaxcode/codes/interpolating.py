"""Codes that draw a curve through the inputs, and another through the answers."""

import math
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, PyTree

from .._pytree import pytree
from ..checks import check_mask, is_static, static_value
from ..interpolants import AbstractInterpolant, Spline
from ..interpolants.abstract import SAME_SITE
from ..linops import AbstractLinop
from ..linops.abstract import prepare_eagerly
from ..nodes import Nodes
from .abstract import AbstractCode
from .plan import Plan


@final
@pytree(eq=False)
class InterpolatingCode(AbstractCode):
    r"""Draws a curve through the inputs at their nodes and a second one through the answers at theirs.

    .. math:: \tilde x_n = u_{\mathrm{enc}}(\beta_n), \qquad \hat y_k = u_{\mathrm{dec}}(\alpha_k)

    The encoder draws the first curve and evaluates it at the worker nodes; the decoder draws the second through the
    answers that came and evaluates it at the data nodes. Any layout goes with any interpolants. The answers of workers
    at one node are averaged. Two answers are enough to decode every input; with fewer all results are NaN.

    Attributes:
        nodes: Where inputs and workers sit.
        encoder: Draws the curve through the inputs.
        decoder: Draws the curve through the answers.

    Raises:
        ValueError: If nodes is not a layout, or encoder or decoder not an interpolant.

    Note:
        Static layouts keep float64 precision under jit where the code is closed over; see `Nodes`.

    References:
        arXiv 2406.00300, sections 3 and 5 (splines); 2009.08327 (rational); 1806.00939 (polynomials).

    >>> from jaxcode import interpolants, nodes
    >>> code = InterpolatingCode(nodes.systematic(3, 9), encoder=Spline(), decoder=interpolants.Berrut())
    >>> returned = np.arange(9) != 1  # the worker of the first input
    >>> code.decode(code.encode(jnp.array([1.0, 2.0, 4.0])), returned).round(2)
    Array([1.04, 2.  , 4.  ], dtype=float32)
    """

    nodes: Nodes  # pyright: ignore[reportIncompatibleVariableOverride]
    encoder: AbstractInterpolant = Spline()
    decoder: AbstractInterpolant = Spline()

    def __post_init__(self):
        if not isinstance(self.nodes, Nodes):
            raise ValueError(f"nodes is {self.nodes!r}; expected a layout such as jaxcode.nodes.systematic(20, 30)")
        for name in ("encoder", "decoder"):
            interpolant = getattr(self, name)
            if not isinstance(interpolant, AbstractInterpolant):
                raise ValueError(
                    f"{name} is {interpolant!r}; expected an interpolant such as jaxcode.interpolants.Spline()"
                )

    @property
    def num_data(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.nodes.data.shape[-1]

    @property
    def num_workers(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.nodes.workers.shape[-1]

    @property
    def predicts_error(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.decoder.predicts_error

    def encoder_linop(self, plan: Plan | None = None) -> AbstractLinop:
        _refuse_assignment(plan)

        def prepare():
            return self.encoder.linop(self.nodes.data, self.nodes.workers)

        # A constant of the traced program where the code is static.
        return prepare_eagerly(prepare) if is_static(self) else prepare()

    def decoder_linop(self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None) -> AbstractLinop:
        _refuse_assignment(plan)
        return self.decoder.linop(self.nodes.workers, self.nodes.data, self._mask(returned))

    def recovered(
        self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None
    ) -> Bool[Array | np.ndarray, "data"]:
        mask = self._mask(returned)
        xp = np if isinstance(mask, np.ndarray) else jnp
        return xp.broadcast_to(mask.sum() >= 2, (self.num_data,))

    def exact(self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None) -> Bool[Array | np.ndarray, "data"]:
        mask = self._mask(returned)
        alpha, beta = self.nodes.data, self.nodes.workers
        if not (self.encoder.interpolates and self.decoder.interpolates):
            return np.zeros(self.num_data, bool)
        is_computed = abs(alpha[:, None] - beta[None]) <= SAME_SITE * (beta[-1] - beta[0])
        return (is_computed & mask[None]).any(axis=1) & self.recovered(mask)

    def decode_with_error(
        self, y: PyTree[ArrayLike], returned: Bool[ArrayLike, "workers"], plan: Plan | None = None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        r"""Decodes the answers that came and predicts the error of each result.

        How fast errors fall with the distance between nodes, and where the curve bends, is estimated from the answers,
        by predicting each from the others. The interval result :math:`\pm 1.645` errors holds the truth in nine cases
        of ten, whether or not f and the curve are smooth on the scale of the nodes, and although a curve through the
        inputs has jumps in its third derivative at data nodes. Coverage is slightly higher where workers sit at data
        nodes and closely between them, slightly lower where f has kinks. Only the error of coding is predicted: the
        truth is f's answer to the input itself.

        Args:
            y: As for `decode`. Features of one leaf share one error model, so a leaf should hold quantities of one
                kind.
            returned: As for `decode`.
            plan: As for `decode`.

        Returns:
            The results of `decode`, and their standard errors, of the same structure, shapes and unit, not negative. An
            error is zero where a worker at the input's own node returned and the decoder interpolates. Others are
            infinite with answers at fewer than three nodes, which do not determine the curvature. Derivatives with
            respect to answers, nodes and smoothing are finite, also where the error is zero.

        Raises:
            ValueError: As for `decode`, or if the decoder predicts no errors.

        References:
            `jaxcode.interpolants.spline.error` describes the method and cites its sources.

        >>> from jaxcode.codes import SplineCode
        >>> code = SplineCode.systematic(num_data=4, num_workers=9)
        >>> returned = np.arange(9) != 3  # the worker of the second input
        >>> results, errors = code.decode_with_error(jnp.exp(jnp.asarray(code.nodes.workers)), returned)
        >>> errors.round(4)
        Array([0.    , 0.0006, 0.    , 0.    ], dtype=float32)
        >>> bool(jnp.all(jnp.abs(results - jnp.exp(jnp.asarray(code.nodes.data))) <= 1.645 * errors + 1e-6))
        True
        """
        if not self.predicts_error:
            raise ValueError(
                f"decoder is {type(self.decoder).__name__}, which predicts no errors; expected one that does, such as "
                "jaxcode.interpolants.Spline()"
            )
        results = self.decode(y, returned, plan)
        mask = jnp.array(self._mask(returned))
        if plan is not None and plan.prior is not None:
            y = plan.prior.residuals(y)

        def predict(leaf, result):
            rows = jnp.asarray(leaf).astype(result.dtype).reshape(self.num_workers, math.prod(result.shape[1:]))
            errors = self.decoder.standard_errors(self.nodes.workers, rows, self.nodes.data, mask)  # pyright: ignore[reportAttributeAccessIssue]
            return errors.reshape(result.shape)

        return results, jax.tree.map(predict, y, results)

    def _mask(self, returned: ArrayLike) -> Array | np.ndarray:
        """Returns the checked mask, in NumPy where it is static."""
        check_mask("returned", returned, self.num_workers)
        static = static_value(returned)
        return jnp.asarray(returned) if static is None else static


def _refuse_assignment(plan):
    if plan is not None and plan.assignment is not None:
        raise ValueError(
            "plan.assignment is given, but this code's workers serve all inputs; expected None, or a code that assigns "
            "inputs to workers, such as ReplicationCode"
        )
