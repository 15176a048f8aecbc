"""The codes of the literature, as constructors of `InterpolatingCode`."""

import functools
from collections.abc import Callable
from typing import Concatenate, Generic, ParamSpec, final

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .. import nodes as layouts
from ..checks import check_count, check_smoothing
from ..interpolants import AbstractInterpolant, Berrut, FloaterHormann, NotAKnot, Polynomial, Spline
from ..nodes import Nodes
from .interpolating import InterpolatingCode

# The parameters of a family's constructor that follow the layout, such as a smoothing or a degree.
Settings = ParamSpec("Settings")


@final
class CodeConstructor(Generic[Settings]):
    """Constructs codes of one family, from given nodes by a call or with a named layout by a method.

    The methods take the sizes of the layout and the family's settings. They raise `ValueError` if a size is too small
    or a setting is invalid.

    Args:
        build: From a layout and the family's settings to a code.
    """

    def __init__(self, build: Callable[Concatenate[Nodes, Settings], InterpolatingCode]):
        self._build = build
        functools.update_wrapper(self, build)

    def __repr__(self) -> str:
        return f"<constructor {self._build.__name__}>"

    def __call__(
        self,
        data_nodes: Float[np.ndarray | Array, "data"],
        worker_nodes: Float[np.ndarray | Array, "workers"],
        *args: Settings.args,
        **settings: Settings.kwargs,
    ) -> InterpolatingCode:
        """Constructs the code for data nodes, strictly ascending (K,), and worker nodes, ascending (N,).

        Raises:
            ValueError: If nodes are not ascending vectors of finite numbers, or a setting is invalid.
        """
        return self._build(Nodes(data_nodes, worker_nodes), *args, **settings)

    def chebyshev(
        self, num_data: int, num_workers: int, *args: Settings.args, **settings: Settings.kwargs
    ) -> InterpolatingCode:
        """Constructs the code with the papers' nodes, `nodes.chebyshev`. Needs K >= 2 and N >= 2."""
        return self._build(layouts.chebyshev(num_data, num_workers), *args, **settings)

    def systematic(
        self, num_data: int, num_workers: int, *args: Settings.args, **settings: Settings.kwargs
    ) -> InterpolatingCode:
        """Constructs the code with a worker at every input, `nodes.systematic`. Needs N >= K >= 2."""
        return self._build(layouts.systematic(num_data, num_workers), *args, **settings)

    def repeated(
        self, num_data: int, num_workers: int, *args: Settings.args, **settings: Settings.kwargs
    ) -> InterpolatingCode:
        """Constructs the code with all workers at inputs, `nodes.repeated`. Needs N >= K >= 2."""
        return self._build(layouts.repeated(num_data, num_workers), *args, **settings)

    def mixed(
        self, num_data: int, num_workers: int, num_between: int, *args: Settings.args, **settings: Settings.kwargs
    ) -> InterpolatingCode:
        """Constructs the code with some workers between inputs, `nodes.mixed`. Needs N >= K >= 2."""
        return self._build(layouts.mixed(num_data, num_workers, num_between), *args, **settings)


@CodeConstructor
def SplineCode(nodes: Nodes, encoder_smoothing: ArrayLike = 0.0, decoder_smoothing: ArrayLike = 0.0):
    r"""Constructs the code of learning-theoretic coded computing (LeTCC): smoothing splines for encoding and decoding.

    Args:
        nodes: The layout. A call passes data nodes and worker nodes instead, a named layout its sizes; see
            `CodeConstructor`.
        encoder_smoothing: The encoder's :math:`\lambda \ge 0`; 0 interpolates the inputs.
        decoder_smoothing: The decoder's :math:`\lambda \ge 0`; above 0 helps where workers' answers are noisy.

    References:
        arXiv 2406.00300, sections 3 and 5. arXiv 2402.04377 (NeRCC) tunes both smoothings of the same code.

    >>> import jax.numpy as jnp
    >>> code = SplineCode.chebyshev(num_data=3, num_workers=6)
    >>> returned = np.array([True, True, False, True, True, True])
    >>> code.decode(code.encode(jnp.array([1.0, 2.0, 4.0])), returned).round(2)
    Array([1.  , 2.03, 4.  ], dtype=float32)
    """
    check_smoothing("encoder_smoothing", encoder_smoothing)
    check_smoothing("decoder_smoothing", decoder_smoothing)
    return InterpolatingCode(nodes, Spline(encoder_smoothing), Spline(decoder_smoothing))


@CodeConstructor
def BerrutCode(nodes: Nodes):
    """Constructs Berrut approximated coded computing (BACC): Berrut's rational interpolant for both.

    Args:
        nodes: The layout. A call passes data nodes and worker nodes instead, a named layout its sizes; see
            `CodeConstructor`.

    References:
        arXiv 2009.08327, section III.

    >>> import jax.numpy as jnp
    >>> code = BerrutCode.chebyshev(num_data=3, num_workers=6)
    >>> code.decode(code.encode(jnp.array([1.0, 2.0, 4.0])), jnp.ones(6, bool)).round(2)
    Array([1.06, 2.12, 3.97], dtype=float32)
    """
    return InterpolatingCode(nodes, Berrut(), Berrut())


@CodeConstructor
def FloaterHormannCode(nodes: Nodes, degree: int = 3):
    """Constructs coded computing with Floater and Hormann's rational interpolants.

    Args:
        nodes: The layout. A call passes data nodes and worker nodes instead, a named layout its sizes; see
            `CodeConstructor`.
        degree: The blending degree, d >= 0; 0 is Berrut's.

    References:
        arXiv 2509.09435.

    >>> import jax.numpy as jnp
    >>> code = FloaterHormannCode.chebyshev(num_data=3, num_workers=6, degree=2)
    >>> code.decode(code.encode(jnp.array([1.0, 2.0, 4.0])), jnp.ones(6, bool)).round(2)
    Array([1., 2., 4.], dtype=float32)
    """
    return InterpolatingCode(nodes, FloaterHormann(degree), FloaterHormann(degree))


@CodeConstructor
def LagrangeCode(nodes: Nodes, degree: int = 1):
    r"""Constructs Lagrange coded computing (LCC), exact where f is a polynomial and enough workers answer.

    If f is a polynomial of degree deg f, the answers lie on one of degree :math:`D = (K-1) \deg f`, and any D+1 of them
    determine it. The decoder fits a polynomial of degree D by least squares to all answers that came; with fewer
    than D+1 of them, the polynomial through them. For a general f the result can be far from the truth: this is the
    baseline that splines replace.

    Args:
        nodes: The layout. A call passes data nodes and worker nodes instead, a named layout its sizes; see
            `CodeConstructor`.
        degree: deg f >= 1.

    References:
        arXiv 1806.00939, section IV.

    >>> import jax.numpy as jnp
    >>> code = LagrangeCode.chebyshev(num_data=3, num_workers=8, degree=2)
    >>> returned = jnp.array([True, False, True, True, False, True, True, False])
    >>> code.decode(code.encode(jnp.array([1.0, 2.0, 4.0])) ** 2, returned).round(4)
    Array([ 1.,  4., 16.], dtype=float32)
    """
    degree = check_count("degree", degree, least=1)
    return InterpolatingCode(nodes, Polynomial(), Polynomial((nodes.data.shape[-1] - 1) * degree))


@CodeConstructor
def BSplineCode(nodes: Nodes, encoder: AbstractInterpolant = Berrut()):  # noqa: B008, it is immutable
    """Constructs B-spline coded computing (BSCC): a cubic B-spline through the answers.

    Args:
        nodes: The layout. A call passes data nodes and worker nodes instead, a named layout its sizes; see
            `CodeConstructor`.
        encoder: Berrut's interpolant, or `Polynomial()`, Lagrange's.

    References:
        arXiv 2601.10616.

    >>> import jax.numpy as jnp
    >>> code = BSplineCode.chebyshev(num_data=3, num_workers=6)
    >>> code.decode(code.encode(jnp.array([1.0, 2.0, 4.0])), jnp.ones(6, bool)).round(2)
    Array([1.  , 2.03, 4.  ], dtype=float32)
    """
    return InterpolatingCode(nodes, encoder, NotAKnot())


# doctest finds the docstrings of objects that are neither functions nor classes only by this dictionary.
__test__ = {
    "SplineCode": SplineCode.__doc__,
    "BerrutCode": BerrutCode.__doc__,
    "FloaterHormannCode": FloaterHormannCode.__doc__,
    "LagrangeCode": LagrangeCode.__doc__,
    "BSplineCode": BSplineCode.__doc__,
}
