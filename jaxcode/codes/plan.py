"""Plans: what is decided about a group of inputs before it is encoded, and what its decoder reads of the inputs."""

from typing import final

import numpy as np
from jaxtyping import Array, Int, PyTree

from .._pytree import pytree


@final
@pytree(eq=False)
class Prior:
    """Holds a prior on f's answers, such as a cheap model's predictions of them.

    Attributes:
        workers: Prior means of the workers' answers, leaves (N, ...) like the answers.
        data: Prior means of the results, leaves (K, ...) like the results.
    """

    workers: PyTree[Array | np.ndarray]
    data: PyTree[Array | np.ndarray]


@final
@pytree(eq=False)
class Plan:
    """Holds the context that a group's encoder and decoder share.

    Attributes:
        assignment: Which input each worker serves, int (N,), for codes that assign inputs to workers; the code's own
            assignment if None.
        prior: A prior on the answers: they are decoded relative to its means, and results that cannot be recovered are
            its means. None for no prior.
        features: Anything else that a code's operators read of the inputs, leaves (K, ...), such as the features of a
            kernel.
    """

    assignment: Int[Array | np.ndarray, "workers"] | None = None
    prior: Prior | None = None
    features: PyTree[Array | np.ndarray] | None = None
