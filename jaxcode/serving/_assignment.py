"""Chooses the order in which coded inputs are assigned to workers."""

import numpy as np

from ..codes import AbstractCode


def assignment_order(code: AbstractCode) -> list[int]:
    """Orders coded inputs by how informative their answers are, for where fewer workers are idle than there are inputs.

    First comes one coded input for each data node at which there is a worker node, as its answer is an exact result;
    then, one after the other, that of the worker node farthest from the nodes of all before it. Those of codes without
    nodes keep their order.

    Args:
        code: A code whose nodes, if it has any, are static.

    Returns:
        A permutation of the numbers of the N coded inputs.
    """
    if code.nodes is None:
        return list(range(code.num_workers))
    alpha, beta = (np.asarray(nodes, np.float64) for nodes in (code.nodes.data, code.nodes.workers))
    nearest_worker = np.abs(beta[:, None] - alpha).argmin(axis=0)
    is_same_node = np.abs(beta[nearest_worker] - alpha) < 1e-9 * (beta[-1] - beta[0])
    order = np.unique(nearest_worker[is_same_node]).tolist() or [0]
    # Nodes that are dense towards the ends, such as Chebyshev's, have equal distances in angle.
    centre, radius = (beta[-1] + beta[0]) / 2, (beta[-1] - beta[0]) / 2
    angle = np.arccos(np.clip((beta - centre) / radius, -1, 1))
    distance = np.abs(angle[:, None] - angle[order]).min(axis=1)
    distance[order] = -1
    while len(order) < len(beta):
        order.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(angle - angle[order[-1]]))
        distance[order] = -1
    return order
