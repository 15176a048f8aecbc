"""LeTCC: smoothing splines both ways."""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from .. import nodes
from .._checks import check_count, check_smoothing, is_concrete
from .._maps import AbstractMap
from .._pytree import pytree
from ..splines.maps import spline_map
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
        smoothing = returned.sum() * self.decoder_smoothing
        return spline_map(self.worker_nodes, self.data_nodes, smoothing, returned)
