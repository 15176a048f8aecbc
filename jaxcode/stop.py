"""When to stop waiting for answers.

A policy looks at the answers so far and says whether they are enough. Policies combine: `answers(25) | deadline(0.2)`
stops at whichever comes first, `answers(25) & error_below(0.1)` when both hold. Whatever the policy says, nobody stops
before the code can decode from the answers that came, nor waits beyond the server's time limit.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Float

from .checks import check_count


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is known of a request that is under way.

    Attributes:
        returned: Whose answers came and are right in shape and dtype, bool, shape (N,).
        elapsed: Seconds since the request was made.
        error: Computes the predicted error of each input from the answers so far, shape (B,); takes milliseconds.
            None where the code predicts none.
    """

    returned: Bool[np.ndarray, "workers"]
    elapsed: float
    error: Callable[[], Float[np.ndarray, "batch"]] | None = None


class AbstractStop(abc.ABC):
    """Says when answers are enough."""

    @abc.abstractmethod
    def reached(self, progress: Progress) -> bool:
        """Whether to stop waiting now. Asked whenever an answer comes, and at `moments`."""

    @abc.abstractmethod
    def moments(self) -> tuple[float, ...]:
        """Seconds after the request was made at which it may say otherwise although no answer came."""

    @abc.abstractmethod
    def check(self, num_workers: int, predicts_error: bool) -> None:
        """Raises ValueError where it could never be reached, with so many workers and predicted errors or none."""

    def __or__(self, other: "AbstractStop") -> "AbstractStop":
        return _Combined((self, other), any)

    def __and__(self, other: "AbstractStop") -> "AbstractStop":
        return _Combined((self, other), all)


def answers(number: int) -> AbstractStop:
    """Stops when so many workers have answered, usually N - S.

    Raises:
        ValueError: If number is not a whole number of at least 1; on use, if there are fewer workers.

    >>> import numpy as np
    >>> answers(2).reached(Progress(np.array([True, False, True]), elapsed=0.1))
    True
    """
    return _Answers(check_count("number", number))


def deadline(seconds: float) -> AbstractStop:
    """Stops so many seconds after the request was made, if what has come can be decoded; else as soon as it can.

    Raises:
        ValueError: If seconds is not a positive number.
    """
    return _Deadline(_check_positive("seconds", seconds))


def error_below(tolerance: float, share: float = 1.0) -> AbstractStop:
    """Stops when the predicted error is at most the tolerance, for a share of the batch's inputs.

    Args:
        tolerance: In the unit of the answers, as `Answer.error`.
        share: The part of the inputs that must be so good, in (0, 1].

    Raises:
        ValueError: If tolerance is not a positive number or share not in (0, 1]; on use, if the code predicts no error.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected the part of the inputs, above 0 and at most 1")
    return _ErrorBelow(_check_positive("tolerance", tolerance), float(share))


def _check_positive(name, value):
    if not value > 0:
        raise ValueError(f"{name} is {value!r}; expected a positive number")
    return float(value)


@dataclasses.dataclass(frozen=True)
class _Answers(AbstractStop):
    number: int

    def reached(self, progress):
        return bool(np.sum(progress.returned) >= self.number)

    def moments(self):
        return ()

    def check(self, num_workers, predicts_error):
        if self.number > num_workers:
            raise ValueError(f"stop waits for answers({self.number}) of {num_workers}; expected at most as many")


@dataclasses.dataclass(frozen=True)
class _Deadline(AbstractStop):
    seconds: float

    def reached(self, progress):
        return progress.elapsed >= self.seconds

    def moments(self):
        return (self.seconds,)

    def check(self, num_workers, predicts_error):
        pass


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
            raise ValueError("stop has error_below, but the code predicts no error; expected a SplineCode")


@dataclasses.dataclass(frozen=True)
class _Combined(AbstractStop):
    parts: tuple[AbstractStop, AbstractStop]
    needs: Callable[[Iterable[bool]], bool]

    def reached(self, progress):
        return self.needs(part.reached(progress) for part in self.parts)

    def moments(self):
        return tuple(moment for part in self.parts for moment in part.moments())

    def check(self, num_workers, predicts_error):
        for part in self.parts:
            part.check(num_workers, predicts_error)
