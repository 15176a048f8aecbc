"""Which coded inputs are computed first."""

import numpy as np

from ..codes import AbstractCode


def dispatch_order(code: AbstractCode) -> list[int]:
    """Orders workers' coded inputs by how much their answers say, for when fewer workers are free than there are.

    First one coded input for each input that is itself computed somewhere, whose answer is then exact; then, one after
    the other, the node that is farthest from all before it. Codes without nodes keep their order.

    Args:
        code: Its nodes are static.

    Returns:
        A permutation of the N coded inputs.
    """
    if code.nodes is None:
        return list(range(code.num_workers))
    alpha, beta = (np.asarray(nodes, np.float64) for nodes in (code.nodes.data, code.nodes.workers))
    nearest = np.abs(beta[:, None] - alpha).argmin(axis=0)
    order = np.unique(nearest[np.abs(beta[nearest] - alpha) < 1e-9 * (beta[-1] - beta[0])]).tolist() or [0]
    # Nodes crowd towards the ends in equal angles.
    middle, radius = (beta[-1] + beta[0]) / 2, (beta[-1] - beta[0]) / 2
    angle = np.arccos(np.clip((beta - middle) / radius, -1, 1))
    distance = np.abs(angle[:, None] - angle[order]).min(axis=1)
    distance[order] = -1
    while len(order) < len(beta):
        order.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(angle - angle[order[-1]]))
        distance[order] = -1
    return order
