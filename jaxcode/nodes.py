r"""Layouts: the nodes at which inputs (alpha) and workers (beta) sit on the curve.

Nodes are NumPy float64 arrays on the host, ascending on [-1, 1]: near the ends Chebyshev nodes are closer than float32
can resolve, and the curve depends on their differences. Each is the sine of an angle measured from the middle, so
that nodes are exactly symmetric; their float64 differences have an absolute error of 1e-16.

References:
    arXiv 2406.00300 (LeTCC), section 5, for alpha and beta.
"""

from typing import final

import numpy as np
from jaxtyping import Array, Float

from ._pytree import pytree
from .checks import check_ascending, check_count, check_vector, static_value

__all__ = [
    "Nodes",
    "chebyshev",
    "chebyshev_first",
    "chebyshev_second",
    "mixed",
    "repeated",
    "systematic",
    "uniform",
]


@final
@pytree(eq=False)
class Nodes:
    """Holds a layout: the nodes of K inputs and N workers.

    Attributes:
        data: alpha, strictly ascending, shape (K,), K >= 2.
        workers: beta, ascending, shape (N,), N >= 2. Workers at one node compute the same coded input, and their
            answers are averaged.

    Raises:
        ValueError: If a concrete vector is not ascending, not finite or too short.

    Note:
        Nodes that the host knows are stored in float64 NumPy arrays and stay so under jit where the object is closed
        over. Passed to a jitted function with x64 off, they are rounded to float32 as all arguments are.
    """

    data: Float[np.ndarray | Array, "data"]
    workers: Float[np.ndarray | Array, "workers"]

    def __post_init__(self):
        for field, name in (("data", "data_nodes"), ("workers", "worker_nodes")):
            vector = getattr(self, field)
            check_vector(name, vector)
            check_ascending(name, vector, strictly=field == "data")
            static = static_value(vector)
            if static is not None:
                object.__setattr__(self, field, np.float64(static))


def chebyshev(num_data: int, num_workers: int) -> Nodes:
    """Places inputs and workers at the nodes of the published codes: alpha of the first kind, beta of the second.

    Args:
        num_data: K, at least 2.
        num_workers: N, at least 2.

    Returns:
        The layout.

    Raises:
        ValueError: If either is not a whole number of at least 2.

    >>> chebyshev(2, 3).workers
    array([-1.,  0.,  1.])
    """
    num_data = check_count("num_data", num_data, least=2)
    num_workers = check_count("num_workers", num_workers, least=2)
    return Nodes(chebyshev_first(num_data), chebyshev_second(num_workers))


def systematic(data: int | Float[np.ndarray, "data"], num_workers: int) -> Nodes:
    """Places a worker at every input and the others between them.

    The answer of a worker at an input's own node is exact. The others are spread over the gaps between data nodes and
    outside the outer ones, evenly in angle, as Chebyshev nodes are.

    Args:
        data: Data nodes, strictly ascending on [-1, 1], shape (K,); or K >= 2, for Chebyshev nodes of the first kind.
        num_workers: N, at least K.

    Returns:
        The layout; all worker nodes are distinct.

    Raises:
        ValueError: If the data nodes are fewer than two, not ascending or beyond [-1, 1], or more than the workers.

    >>> systematic(2, 3).workers.round(3)
    array([-0.707,  0.   ,  0.707])
    """
    alpha, num_workers = _check_arguments(data, num_workers)
    return Nodes(alpha, _interleave(alpha, num_workers))


def repeated(data: int | Float[np.ndarray, "data"], num_workers: int) -> Nodes:
    """Places all workers at inputs, evenly: the layout of replication.

    Args:
        data: As for `systematic`.
        num_workers: N, at least K.

    Returns:
        The layout; each data node is that of N // K or N // K + 1 workers.

    Raises:
        ValueError: As for `systematic`, but data nodes may lie beyond [-1, 1].

    >>> repeated(uniform(2), 3).workers
    array([-1., -1.,  1.])
    """
    alpha, num_workers = _check_arguments(data, num_workers)
    return Nodes(alpha, np.sort(alpha[np.arange(num_workers) % len(alpha)]))


def mixed(data: int | Float[np.ndarray, "data"], num_workers: int, num_between: int) -> Nodes:
    """Places a worker at every input, some between inputs, and the rest at inputs again.

    Interpolates between `repeated` (num_between = 0) and `systematic` (num_between = N - K). The remaining
    N - K - num_between workers are further copies of inputs, chosen evenly along the curve.

    Args:
        data: As for `systematic`.
        num_workers: N, at least K.
        num_between: Workers between data nodes, from 0 to N - K.

    Returns:
        The layout.

    Raises:
        ValueError: As for `systematic`, or if num_between is out of range.

    >>> mixed(uniform(3), 5, num_between=1).workers
    array([-1.        , -0.70710678,  0.        ,  0.        ,  1.        ])
    """
    alpha, num_workers = _check_arguments(data, num_workers)
    num_data = len(alpha)
    if check_count("num_between", num_between, least=0) > num_workers - num_data:
        raise ValueError(
            f"num_between is {num_between}; expected at most num_workers - num_data, {num_workers - num_data}"
        )
    num_copies = num_workers - num_data - num_between
    copied_index = (np.arange(num_copies) * num_data + num_data // 2) // max(num_copies, 1)
    return Nodes(alpha, np.sort(np.concatenate([_interleave(alpha, num_data + num_between), alpha[copied_index]])))


def chebyshev_first(count: int) -> Float[np.ndarray, "count"]:
    r"""Returns Chebyshev nodes of the first kind, :math:`\cos((2k-1)\pi/2n)`: the roots, which leave out both ends.

    Args:
        count: n >= 1.

    Returns:
        Ascending float64 nodes in (-1, 1).

    Raises:
        ValueError: If count is not a whole number of at least 1.

    >>> chebyshev_first(3).round(3)
    array([-0.866,  0.   ,  0.866])
    """
    count = check_count("count", count)
    return np.sin(np.pi * (2 * np.arange(count) + 1 - count) / (2 * count))


def chebyshev_second(count: int) -> Float[np.ndarray, "count"]:
    r"""Returns Chebyshev nodes of the second kind, :math:`\cos((k-1)\pi/(n-1))`: the extrema, which include both ends.

    Args:
        count: n >= 2.

    Returns:
        Ascending float64 nodes on [-1, 1].

    Raises:
        ValueError: If count is not a whole number of at least 2.

    >>> chebyshev_second(3)
    array([-1.,  0.,  1.])
    """
    count = check_count("count", count, least=2)
    return np.sin(np.pi * (2 * np.arange(count) + 1 - count) / (2 * (count - 1)))


def uniform(count: int) -> Float[np.ndarray, "count"]:
    """Returns equally spaced nodes from -1 to 1.

    Args:
        count: n >= 2.

    Returns:
        Ascending float64 nodes.

    Raises:
        ValueError: If count is not a whole number of at least 2.

    >>> uniform(3)
    array([-1.,  0.,  1.])
    """
    return np.linspace(-1.0, 1.0, check_count("count", count, least=2))


def _check_arguments(data, num_workers):
    """Checks the data nodes, or makes them of their number, and the number of workers; returns both."""
    if np.ndim(data) == 0:
        data = chebyshev_first(check_count("num_data", data, least=2))
    check_vector("data_nodes", data)
    check_ascending("data_nodes", data, strictly=True)
    alpha = np.asarray(data, np.float64)
    num_workers = check_count("num_workers", num_workers)
    if num_workers < len(alpha):
        raise ValueError(
            f"num_workers is {num_workers}; expected at least one worker for each of the {len(alpha)} data nodes"
        )
    return alpha, num_workers


def _interleave(alpha, num_workers):
    """Places a worker at every data node and the others in the gaps between them."""
    if np.max(np.abs(alpha)) > 1:
        raise ValueError(f"data_nodes reach from {alpha[0]} to {alpha[-1]}; expected nodes on [-1, 1]")
    num_between = num_workers - len(alpha)
    bounds = np.concatenate([[-np.pi / 2], np.arcsin(alpha), [np.pi / 2]])
    # Angles spread evenly over the whole curve say how many nodes each gap gets; these then divide their gap evenly.
    uniform_angles = np.pi * ((np.arange(num_between) + 0.5) / max(num_between, 1) - 0.5)
    per_gap = np.bincount(np.searchsorted(bounds[1:-1], uniform_angles), minlength=len(alpha) + 1)
    kinds = ["first", *["inner"] * (len(alpha) - 1), "last"]
    angles = [
        _divide_gap(low, high, count, kind)
        for low, high, count, kind in zip(bounds[:-1], bounds[1:], per_gap, kinds, strict=True)
    ]
    return np.sort(np.concatenate([alpha, np.sin(np.concatenate(angles))]))


def _divide_gap(low, high, count, kind):
    """Divides a gap between data nodes evenly by angles; in the first and last gap they include the end."""
    if kind == "first":
        return np.linspace(low, high, count + 1)[:-1]
    if kind == "last":
        return np.linspace(low, high, count + 1)[1:]
    return np.linspace(low, high, count + 2)[1:-1]
