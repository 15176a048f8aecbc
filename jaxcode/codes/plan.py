"""What is decided about a group of inputs before it is encoded, and what its decoder needs of the inputs."""

from typing import final

import numpy as np
from jaxtyping import Array, Int, PyTree

from .._pytree import pytree


@final
@pytree(eq=False)
class Prior:
    """What is known of f's answers before any worker answers, such as a cheap model's predictions.

    Attributes:
        workers: Prior means of the workers' answers, leaves (N, ...) like the answers.
        data: Prior means of the results, leaves (K, ...) like the results.
    """

    workers: PyTree[Array | np.ndarray]
    data: PyTree[Array | np.ndarray]


@final
@pytree(eq=False)
class Plan:
    """The context that goes from the encoder of a group of inputs to its decoder.

    Attributes:
        assignment: Which input each worker serves, int (N,), for codes that assign inputs to workers; the code's own
            assignment if None.
        prior: What is known of the answers beforehand: answers are decoded relative to it, and results that cannot be
            recovered are its means. None for nothing.
        features: What else a code's operators read of the inputs, leaves (K, ...), such as the features of a kernel.
    """

    assignment: Int[Array | np.ndarray, "workers"] | None = None
    prior: Prior | None = None
    features: PyTree[Array | np.ndarray] | None = None
