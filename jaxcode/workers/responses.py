"""What comes back from a pool of workers, and what can go wrong."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, PyTree


class PoolClosed(RuntimeError):
    """The pool was closed before or during the request."""


class NotEnoughAnswers(RuntimeError):
    """Within the time limit too few workers answered to decode anything.

    Attributes:
        responses: What had come by then.
    """

    def __init__(self, message: str, responses: "Responses"):
        super().__init__(message)
        self.responses = responses


class Fault(NamedTuple):
    """What went wrong during a request.

    Attributes:
        worker: With which worker.
        kind: Its process died or was given up, it raised an exception, or its answer had another shape or dtype than
            the model's or was not finite.
        message: In words.
    """

    worker: int
    kind: Literal["died", "raised", "refused"]
    message: str


@dataclasses.dataclass(frozen=True, eq=False)
class Responses:
    """What came from the workers, by share.

    Attributes:
        values: NumPy arrays, leaves (N, ...); zeros where no answer came.
        returned: To which shares answers came and were accepted, bool, shape (N,).
        latency: Seconds from the request to each answer, shape (N,); infinite where none came.
        faults: What went wrong.
        seconds: From the request to the decision to stop waiting.
    """

    values: PyTree[np.ndarray]
    returned: Bool[np.ndarray, "workers"]
    latency: Float[np.ndarray, "workers"]
    faults: tuple[Fault, ...]
    seconds: float


# Whether answers of those that returned can be used, and how far off they are thought to be.
Enough = Callable[[Bool[np.ndarray, "workers"]], bool]
PredictedError = Callable[[PyTree[np.ndarray], Bool[np.ndarray, "workers"]], Float[np.ndarray, "batch"]]
