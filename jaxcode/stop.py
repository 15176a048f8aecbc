"""Decides when a request stops waiting for answers.

A policy decides from the answers that came and the time. Policies combine: `answers(25) | deadline(0.2)` stops at
whichever comes first, `answers(25) & error_below(0.1)` when both hold. With any policy, a request waits until the
answers are enough to decode, and never beyond the server's time limit.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable
from typing import final

import numpy as np
from jaxtyping import Bool, Float

from .checks import check_count, check_scalar

__all__ = ["AbstractStop", "Progress", "answers", "deadline", "error_below"]


@final
@dataclasses.dataclass(frozen=True)
class Progress:
    """Describes the progress of a request.

    Attributes:
        returned: Which of the N coded inputs have a valid answer, bool, shape (N,).
        elapsed: Seconds since the request was made.
        error: Predicts the error of each input from the answers so far, shape (B,), which takes milliseconds. None
            where the code predicts none.
    """

    returned: Bool[np.ndarray, "workers"]
    elapsed: float
    error: Callable[[], Float[np.ndarray, "batch"]] | None = None


class AbstractStop(abc.ABC):
    """Decides when a request stops waiting."""

    @abc.abstractmethod
    def reached(self, progress: Progress) -> bool:
        """Returns whether to stop waiting; called whenever an answer arrives, and at `moments`."""

    @abc.abstractmethod
    def moments(self) -> tuple[float, ...]:
        """Returns the times, in seconds since the request, at which `reached` may change without an answer."""

    @abc.abstractmethod
    def check(self, num_workers: int, predicts_error: bool) -> None:
        """Checks that every part of the policy can be reached.

        Args:
            num_workers: N, how many answers there can be.
            predicts_error: Whether the code predicts errors.

        Raises:
            ValueError: If one never can.
        """

    def __or__(self, other: "AbstractStop") -> "AbstractStop":
        """Stops when either policy does."""
        return _Combined((self, other), any)

    def __and__(self, other: "AbstractStop") -> "AbstractStop":
        """Stops when both policies do."""
        return _Combined((self, other), all)


def answers(number: int) -> AbstractStop:
    """Stops when a number of coded inputs have an answer.

    Args:
        number: How many, usually N - S with S stragglers.

    Returns:
        The policy.

    Raises:
        ValueError: If number is not a whole number of at least 1; on use, if N is lower.

    >>> import numpy as np
    >>> answers(2).reached(Progress(np.array([True, False, True]), elapsed=0.1))
    True
    """
    return _Answers(check_count("number", number))


def deadline(seconds: float) -> AbstractStop:
    """Stops a number of seconds after the request was made, or as soon after that as the answers are enough to decode.

    Args:
        seconds: Seconds since the request was made.

    Returns:
        The policy.

    Raises:
        ValueError: If seconds is not a positive number.
    """
    check_scalar("seconds", seconds, lambda number: number > 0, "a positive number: give the wait in seconds, e.g. 0.2")
    return _Deadline(float(seconds))


def error_below(tolerance: float, share: float = 1.0) -> AbstractStop:
    """Stops when the predicted error is at most the tolerance, for a fraction of the batch's inputs.

    Args:
        tolerance: The largest predicted error, in the units of the answers.
        share: The fraction of the inputs that must be within the tolerance, in (0, 1].

    Returns:
        The policy.

    Raises:
        ValueError: If tolerance is not a positive number or share not in (0, 1]; on use, if the code predicts no error.
    """
    expected = "a number in (0, 1]: give the fraction of the inputs that must be within the tolerance"
    check_scalar("share", share, lambda number: 0 < number <= 1, expected)
    expected = "a positive number: give the largest predicted error, in the units of the answers"
    check_scalar("tolerance", tolerance, lambda number: number > 0, expected)
    return _ErrorBelow(float(tolerance), float(share))


@final
@dataclasses.dataclass(frozen=True)
class _Answers(AbstractStop):
    number: int

    def reached(self, progress):
        return bool(np.sum(progress.returned) >= self.number)

    def moments(self):
        return ()

    def check(self, num_workers, predicts_error):
        if self.number > num_workers:
            raise ValueError(
                f"stop has answers({self.number}) with {num_workers} workers; expected at most as many answers as "
                f"workers: wait for {num_workers} or fewer"
            )


@final
@dataclasses.dataclass(frozen=True)
class _Deadline(AbstractStop):
    seconds: float

    def reached(self, progress):
        return progress.elapsed >= self.seconds

    def moments(self):
        return (self.seconds,)

    def check(self, num_workers, predicts_error):
        pass


@final
@dataclasses.dataclass(frozen=True)
class _ErrorBelow(AbstractStop):
    tolerance: float
    share: float

    def reached(self, progress):
        return progress.error is not None and bool(np.mean(progress.error() <= self.tolerance) >= self.share)

    def moments(self):
        return ()

    def check(self, num_workers, predicts_error):
        if not predicts_error:
            raise ValueError(
                "stop has error_below with a code that predicts no error; expected one whose predicts_error is True: "
                "use a spline code, or stop by answers or deadline"
            )


@final
@dataclasses.dataclass(frozen=True)
class _Combined(AbstractStop):
    parts: tuple[AbstractStop, AbstractStop]
    combine: Callable[[Iterable[bool]], bool]

    def reached(self, progress):
        return self.combine(part.reached(progress) for part in self.parts)

    def moments(self):
        return tuple(moment for part in self.parts for moment in part.moments())

    def check(self, num_workers, predicts_error):
        for part in self.parts:
            part.check(num_workers, predicts_error)
