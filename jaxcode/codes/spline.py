"""LeTCC: smoothing splines both ways."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, PyTree

from .. import nodes
from .._checks import check_count, check_smoothing, is_concrete
from .._maps import AbstractMap
from .._pytree import pytree
from ..splines.maps import spline_map
from ..splines.posterior import predicted_errors
from .abstract import AbstractInterpolatingCode, as_nodes


@pytree(eq=False)
class SplineCode(AbstractInterpolatingCode):
    r"""Learning-theoretic coded computing (LeTCC): a smoothing spline through the inputs, another through the answers.

    Each curve minimises :math:`\frac1n \sum_i (u(t_i) - y_i)^2 + \lambda \int u''^2` over its n points: the encoder
    over all K inputs, the decoder over the answers that came, however many those are.

    Attributes:
        data_nodes: alpha, where the inputs sit, strictly ascending, shape (K,).
        worker_nodes: beta, where the workers sit, ascending, shape (N,). Workers at one node compute the same coded
            input, and what they return is averaged.
        encoder_smoothing: The encoder's :math:`\lambda \ge 0`; 0 draws the curve through the inputs themselves.
        decoder_smoothing: The decoder's :math:`\lambda \ge 0`; above 0 helps where workers' answers are noisy.

    Raises:
        ValueError: If nodes are not ascending vectors of finite numbers, or a smoothing is negative.

    Note:
        Known nodes are float64 in NumPy and stay so under jit when the code is closed over. Passed to a jitted function
        as an argument with x64 off, they are rounded to float32 as all arguments are.

    References:
        arXiv 2406.00300, sections 3 and 5. arXiv 2402.04377 (NeRCC) tunes the two smoothings of the same pair.

    >>> import jax.numpy as jnp
    >>> code = SplineCode.chebyshev(num_data=3, num_workers=6)
    >>> returned = np.array([True, True, False, True, True, True])
    >>> code.decode(code.encode(jnp.array([1.0, 2.0, 4.0])), returned).round(2)
    Array([1.  , 2.03, 4.  ], dtype=float32)
    """

    data_nodes: np.ndarray | Array
    worker_nodes: np.ndarray | Array
    encoder_smoothing: ArrayLike = 0.0
    decoder_smoothing: ArrayLike = 0.0

    def __post_init__(self):
        as_nodes(self, workers_may_share=True)
        for name in ("encoder_smoothing", "decoder_smoothing"):
            smoothing = getattr(self, name)
            check_smoothing(name, smoothing)
            if is_concrete(smoothing):
                object.__setattr__(self, name, float(smoothing))

    @classmethod
    def chebyshev(
        cls,
        num_data: int,
        num_workers: int,
        *,
        encoder_smoothing: ArrayLike = 0.0,
        decoder_smoothing: ArrayLike = 0.0,
    ) -> "SplineCode":
        """The nodes of the paper: alpha Chebyshev of the first kind, beta of the second. Needs K >= 2 and N >= 2."""
        return cls(*nodes.chebyshev_pair(num_data, num_workers), encoder_smoothing, decoder_smoothing)

    @classmethod
    def systematic(
        cls,
        num_data: int,
        num_workers: int,
        *,
        encoder_smoothing: ArrayLike = 0.0,
        decoder_smoothing: ArrayLike = 0.0,
    ) -> "SplineCode":
        """Beta contains alpha, the rest is interleaved: an answer to an input itself is exact. Needs N >= K >= 2."""
        alpha = nodes.chebyshev_first(check_count("num_data", num_data, least=2))
        return cls(alpha, nodes.systematic(alpha, num_workers), encoder_smoothing, decoder_smoothing)

    @classmethod
    def repeated(
        cls,
        num_data: int,
        num_workers: int,
        *,
        encoder_smoothing: ArrayLike = 0.0,
        decoder_smoothing: ArrayLike = 0.0,
    ) -> "SplineCode":
        """Beta repeats alpha: replication, but a lost input is read off the curve. Needs N >= K >= 2."""
        alpha = nodes.chebyshev_first(check_count("num_data", num_data, least=2))
        return cls(alpha, nodes.repeated(alpha, num_workers), encoder_smoothing, decoder_smoothing)

    def encoding_curve(self) -> AbstractMap:
        smoothing = self.num_data * self.encoder_smoothing
        return spline_map(self.data_nodes, self.worker_nodes, smoothing, np.ones(self.num_data))

    def decoding_curve(self, returned: Bool[Array | np.ndarray, "workers"]) -> AbstractMap:
        # The mean square over |F| answers, times |F|, is the solver's sum of squares.
        count = np.count_nonzero(returned) if isinstance(returned, np.ndarray) else returned.sum()
        smoothing = count * self.decoder_smoothing
        return spline_map(self.worker_nodes, self.data_nodes, smoothing, returned)

    def decode_with_error(
        self, y: PyTree[Array], returned: Bool[ArrayLike, "workers"]
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        r"""Decodes the answers that came, and says before any truth is known how far off each result may be.

        How fast errors fall with the distance between nodes, and where the curve bends, is read off the answers
        themselves, by predicting each from the others. The results :math:`\pm 1.645` errors are to hold nine truths of
        ten, whether f and the curve are smooth on the scale of the nodes or not, with jumps in the third derivative at
        data nodes, which a curve through the inputs has. A few more do where workers sit at data nodes and closely
        between them, a few less where f has kinks.
        Coding's error only: what f would have answered to the input itself is the truth.

        Args:
            y: As for `decode`. Features of one leaf are judged together, so let one leaf hold numbers of one kind.
            returned: As for `decode`.

        Returns:
            The results of `decode`, and standard errors like them, not negative, in the same unit. Zero where a worker
            at the input's own node returned and the decoder interpolates; infinite, unless so, with answers at fewer
            than three nodes: nothing then tells how the curve bends. Derivatives with respect to answers, nodes and
            smoothing are finite, at errors of zero too.

        Raises:
            ValueError: As for `decode`.

        References:
            `jaxcode.splines.posterior` says how, and after whom.

        >>> import jax.numpy as jnp
        >>> code = SplineCode.systematic(num_data=4, num_workers=9)
        >>> returned = np.arange(9) != 3  # the worker of the second input
        >>> results, errors = code.decode_with_error(jnp.exp(jnp.asarray(code.worker_nodes)), returned)
        >>> errors.round(4)
        Array([0.    , 0.0006, 0.    , 0.    ], dtype=float32)
        >>> bool(jnp.all(jnp.abs(results - jnp.exp(jnp.asarray(code.data_nodes))) <= 1.645 * errors + 1e-6))
        True
        """
        results = self.decode(y, returned)
        mask = jnp.array(returned)
        exact = is_concrete(self.decoder_smoothing) and self.decoder_smoothing == 0
        smoothing = 0.0 if exact else mask.sum() * self.decoder_smoothing

        def on_leaf(leaf, result):
            rows = jnp.asarray(leaf).astype(result.dtype).reshape(self.num_workers, math.prod(result.shape[1:]))
            errors = predicted_errors(self.worker_nodes, rows, self.data_nodes, mask, smoothing)
            return errors.reshape(result.shape)

        return results, jax.tree.map(on_leaf, y, results)
