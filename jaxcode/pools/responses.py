"""Defines the responses, faults and exceptions of pools."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, PyTree


class PoolClosed(RuntimeError):
    """Raised when the pool was closed before or during the request."""


class NotEnoughAnswers(RuntimeError):
    """Raised when too few answers to decode came within the time limit, or no worker is left that could answer.

    Attributes:
        responses: The answers that came until then, and the faults.
    """

    def __init__(self, message: str, responses: "Responses"):
        super().__init__(message)
        self.responses = responses

    def __reduce__(self):
        return NotEnoughAnswers, (str(self), self.responses)


class Fault(NamedTuple):
    """Describes one failure of a worker during a request.

    Attributes:
        worker: Index of the worker.
        kind: "died": its process died or was given up as stuck. "raised": it raised an exception. "invalid": its answer
            was invalid, of another structure, shape or dtype than the model's or not finite.
        message: The reason, in words.
    """

    worker: int
    kind: Literal["died", "raised", "invalid"]
    message: str


@dataclasses.dataclass(frozen=True, eq=False)
class Responses:
    """Holds the answers of workers to the N shares of a request, see `AbstractPool`.

    Attributes:
        values: Answers, NumPy arrays, leaves (N, batch, ...); zeros where none came.
        returned: Which shares have a valid answer, bool, shape (N,).
        latency: Seconds from the request to each answer, shape (N,); infinite where none came.
        worker: The index of the worker that gave each answer, shape (N,); -1 where none came.
        faults: The failures of workers.
        seconds: Seconds from the request to the decision to stop waiting.
    """

    values: PyTree[np.ndarray]
    returned: Bool[np.ndarray, "workers"]
    latency: Float[np.ndarray, "workers"]
    worker: Int[np.ndarray, "workers"]
    faults: tuple[Fault, ...]
    seconds: float


# Returns whether the answers of the shares that returned can be decoded.
CanDecode = Callable[[Bool[np.ndarray, "workers"]], bool | np.bool_]
# From the shares that returned to how much an answer to each of the others is worth, shape (N,), not negative.
Worth = Callable[[Bool[np.ndarray, "workers"]], Float[np.ndarray, "workers"]]
# Predicts the error of each input of the batch, from the answers and the shares that returned.
PredictedError = Callable[[PyTree[np.ndarray], Bool[np.ndarray, "workers"]], Float[np.ndarray, "batch"]]
