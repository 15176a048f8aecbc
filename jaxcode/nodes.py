"""Where the inputs (alpha) and the workers (beta) sit on the curve.

Nodes are NumPy float64 arrays on the host, ascending on [-1, 1]: near the ends Chebyshev nodes are closer than float32
can tell apart, and their differences decide the spline. Each is the sine of an angle measured from the middle, which
makes the nodes exactly symmetric; their float64 differences are right to 1e-16 absolutely.

References:
    arXiv 2406.00300 (LeTCC), section 5, for alpha and beta.
"""

import numpy as np
from jaxtyping import Float

from ._checks import check_ascending, check_count, check_vector


def chebyshev_first(count: int) -> Float[np.ndarray, "count"]:
    r"""Chebyshev nodes of the first kind, :math:`\cos((2k-1)\pi/2n)`: the roots, which leave out both ends.

    Args:
        count: How many, at least 1.

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
    r"""Chebyshev nodes of the second kind, :math:`\cos((k-1)\pi/(n-1))`: the extrema, which include both ends.

    Args:
        count: How many, at least 2.

    Returns:
        Ascending float64 nodes on [-1, 1].

    Raises:
        ValueError: If count is not a whole number of at least 2.

    >>> chebyshev_second(3)
    array([-1.,  0.,  1.])
    """
    count = check_count("count", count, least=2)
    return np.sin(np.pi * (2 * np.arange(count) + 1 - count) / (2 * (count - 1)))


def chebyshev_pair(num_data: int, num_workers: int) -> tuple[Float[np.ndarray, "data"], Float[np.ndarray, "workers"]]:
    """The nodes of the published codes: alpha of the first kind, beta of the second.

    Args:
        num_data: K, at least 2.
        num_workers: N, at least 2.

    Returns:
        Data nodes and worker nodes.

    Raises:
        ValueError: If either is not a whole number of at least 2.
    """
    num_data = check_count("num_data", num_data, least=2)
    num_workers = check_count("num_workers", num_workers, least=2)
    return chebyshev_first(num_data), chebyshev_second(num_workers)


def uniform(count: int) -> Float[np.ndarray, "count"]:
    """Equally spaced nodes from -1 to 1.

    Args:
        count: How many, at least 2.

    Returns:
        Ascending float64 nodes.

    Raises:
        ValueError: If count is not a whole number of at least 2.

    >>> uniform(3)
    array([-1.,  0.,  1.])
    """
    return np.linspace(-1.0, 1.0, check_count("count", count, least=2))


def systematic(data_nodes: Float[np.ndarray, "data"], num_workers: int) -> Float[np.ndarray, "workers"]:
    """Worker nodes that contain every data node, the rest between them.

    The first K workers, so to speak, compute the inputs themselves; what they return is exact. The others are spread
    evenly over the gaps between the data nodes and beyond the outer ones, evenly in angle, as Chebyshev nodes are.

    Args:
        data_nodes: Strictly ascending on [-1, 1], shape (K,).
        num_workers: N, at least K.

    Returns:
        Ascending float64 nodes, shape (N,), all different.

    Raises:
        ValueError: If the data nodes are not ascending on [-1, 1] or there are fewer workers than data nodes.

    >>> systematic(chebyshev_first(2), 3).round(3)
    array([-0.707,  0.   ,  0.707])
    """
    data_nodes, num_workers = _check_cover(data_nodes, num_workers)
    if np.max(np.abs(data_nodes)) > 1:
        raise ValueError(f"data_nodes reach from {data_nodes[0]} to {data_nodes[-1]}; expected nodes on [-1, 1]")
    extra = num_workers - len(data_nodes)
    bounds = np.concatenate([[-np.pi / 2], np.arcsin(data_nodes), [np.pi / 2]])
    # Evenly spread targets say how many go into each gap; within a gap they divide it evenly.
    targets = np.pi * ((np.arange(extra) + 0.5) / max(extra, 1) - 0.5)
    per_gap = np.bincount(np.searchsorted(bounds[1:-1], targets), minlength=len(data_nodes) + 1)
    between = [
        _divide(low, high, count, place)
        for low, high, count, place in zip(
            bounds[:-1],
            bounds[1:],
            per_gap,
            ["first", *["inner"] * (len(data_nodes) - 1), "last"],
            strict=True,
        )
    ]
    return np.sort(np.concatenate([data_nodes, np.sin(np.concatenate(between))]))


def repeated(data_nodes: Float[np.ndarray, "data"], num_workers: int) -> Float[np.ndarray, "workers"]:
    """The data nodes themselves, dealt out to the workers in turn: replication whose lost inputs a spline fills in.

    Args:
        data_nodes: Strictly ascending, shape (K,).
        num_workers: N, at least K.

    Returns:
        Ascending float64 nodes, shape (N,); each data node occurs N // K or N // K + 1 times.

    Raises:
        ValueError: If the data nodes are not ascending or there are fewer workers than data nodes.

    >>> repeated(uniform(2), 3)
    array([-1., -1.,  1.])
    """
    data_nodes, num_workers = _check_cover(data_nodes, num_workers)
    return np.sort(data_nodes[np.arange(num_workers) % len(data_nodes)])


def mixed(data_nodes: Float[np.ndarray, "data"], num_workers: int, num_between: int) -> Float[np.ndarray, "workers"]:
    """Every data node, some of them again, and nodes between them: from replication to `systematic` in steps of one.

    Of the N - K workers beyond the first copy of every input, num_between sit between the data nodes as in
    `systematic`. The others hold second copies (third, ...) of inputs spread evenly over the curve, so that an input
    with one copy has neighbours with two.

    Args:
        data_nodes: Strictly ascending on [-1, 1], shape (K,).
        num_workers: N, at least K.
        num_between: How many workers sit between data nodes, from 0 to N - K.

    Returns:
        Ascending float64 nodes, shape (N,).

    Raises:
        ValueError: If the data nodes are not ascending on [-1, 1], there are fewer workers than data nodes, or
            num_between is out of range.

    >>> mixed(uniform(3), 5, num_between=1)
    array([-1.        , -0.70710678,  0.        ,  0.        ,  1.        ])
    """
    data_nodes, num_workers = _check_cover(data_nodes, num_workers)
    num_data = len(data_nodes)
    if check_count("num_between", num_between, least=0) > num_workers - num_data:
        raise ValueError(
            f"num_between is {num_between}; expected at most num_workers - num_data, {num_workers - num_data}"
        )
    copies = num_workers - num_data - num_between
    again = (np.arange(copies) * num_data + num_data // 2) // max(copies, 1)
    return np.sort(np.concatenate([systematic(data_nodes, num_data + num_between), data_nodes[again]]))


def _check_cover(data_nodes, num_workers):
    check_vector("data_nodes", data_nodes)
    check_ascending("data_nodes", data_nodes, strictly=True)
    data_nodes = np.asarray(data_nodes, np.float64)
    num_workers = check_count("num_workers", num_workers)
    if num_workers < len(data_nodes):
        raise ValueError(
            f"num_workers is {num_workers}; expected at least one worker for each of the {len(data_nodes)} data nodes"
        )
    return data_nodes, num_workers


def _divide(low, high, count, place):
    """Angles that divide a gap between data nodes evenly; beyond the outer data node they reach the end itself."""
    if place == "first":
        return np.linspace(low, high, count + 1)[:-1]
    if place == "last":
        return np.linspace(low, high, count + 1)[1:]
    return np.linspace(low, high, count + 2)[1:-1]
