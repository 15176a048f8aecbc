"""One request to a pool: what is asked for, what has come, and when it is over."""

import collections
import functools
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from ..stop import AbstractStop, Progress
from .compute import refusal
from .responses import Enough, Fault, NotEnoughAnswers, PredictedError, Responses

# A share that went wrong, or that someone died of, is given out once more, not for ever.
_ATTEMPTS = 2


class Request:
    """Shares of coded inputs, each to be computed by some worker.

    Shares are given out and answers accepted by one thread, while another waits in `gather`.

    Args:
        shares: Leaves (shares, batch, ...).
        expected: What the answer to one share looks like.
        order: In which order shares are given out.
        again_after: Seconds after which a share that has no answer is given out once more; None for never.
    """

    def __init__(
        self,
        shares: PyTree[np.ndarray],
        expected: PyTree[jax.ShapeDtypeStruct],
        order: Sequence[int],
        again_after: float | None,
    ):
        number = len(order)
        self._shares, self.expected, self.again_after = shares, expected, again_after
        self._values = jax.tree.map(lambda leaf: np.zeros((number, *leaf.shape), leaf.dtype), expected)
        self.returned = np.zeros(number, bool)
        self._latency = np.full(number, np.inf)
        self._todo = collections.deque(int(share) for share in order)
        self._attempts = np.zeros(number, int)
        self._sent = np.full(number, np.inf)
        # Workers that failed at it get no more of it, or one would run through all shares.
        self.failed: set[int] = set()
        self.faults: list[Fault] = []
        self._began = time.monotonic()
        self.finished = False
        self._failure: Exception | None = None
        self._hope = True
        self._changed = threading.Condition()

    # ---- for those who give out shares and bring answers ---------------------------------------------------

    def take(self, worker: int) -> int | None:
        """Gives this worker a share, if there is one for it."""
        if self.finished or worker in self.failed:
            return None
        share = self._todo.popleft() if self._todo else self._overdue()
        if share is not None:
            self._attempts[share] += 1
            self._sent[share] = time.monotonic()
        return share

    def _overdue(self):
        """The share that has waited longest for its answer, if too long."""
        if self.again_after is None:
            return None
        sent_before = time.monotonic() - self.again_after
        overdue = ~self.returned & (self._attempts < _ATTEMPTS) & (self._sent <= sent_before)
        return int(np.argmin(np.where(overdue, self._sent, np.inf))) if overdue.any() else None

    def batch(self, share: int) -> PyTree[np.ndarray]:
        """The coded inputs of a share."""
        return jax.tree.map(lambda leaf: leaf[share], self._shares)

    def accept(self, share: int, answer: object) -> str | None:
        """Keeps an answer, or says why not."""
        problem = refusal(answer, self.expected)
        if problem is None and not self.returned[share]:
            for row, leaf in zip(jax.tree.leaves(self._values), jax.tree.leaves(answer), strict=True):
                row[share] = leaf
            with self._changed:
                self._latency[share] = time.monotonic() - self._began
                self.returned[share] = True
                self._changed.notify_all()
        return problem

    def give_back(self, share: int, worker: int, fault: Fault) -> None:
        """The share went wrong with this worker; another may have it."""
        self.failed.add(worker)
        self.faults.append(fault)
        if not self.returned[share] and self._attempts[share] < _ATTEMPTS:
            self._todo.appendleft(share)

    @property
    def open_shares(self) -> bool:
        """Whether there are shares that nobody has been given yet."""
        return bool(self._todo)

    def has_hope(self, hope: bool) -> None:
        """Whether somebody may soon answer."""
        if hope != self._hope:
            with self._changed:
                self._hope = hope
                self._changed.notify_all()

    def fail(self, failure: Exception) -> None:
        """Ends the request with an exception."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    # ---- for the one who waits -----------------------------------------------------------------------------

    def gather(self, stop: AbstractStop, time_limit: float, enough: Enough, error: PredictedError | None) -> Responses:
        """Waits until answers are enough, as `AbstractPool.run`."""
        moments = (*stop.moments(), time_limit)
        seen = -1
        while True:
            with self._changed:
                elapsed = time.monotonic() - self._began
                pending = [moment - elapsed for moment in moments if moment > elapsed]
                if self.returned.sum() == seen and self._hope and self._failure is None and pending:
                    self._changed.wait(min(pending))
                returned, hope = self.returned.copy(), self._hope
            if self._failure is not None:
                raise self._failure
            seen, elapsed = returned.sum(), time.monotonic() - self._began
            over = elapsed >= time_limit
            if enough(returned):
                predicted = None if error is None else functools.cache(functools.partial(error, self._values, returned))
                if over or not hope or stop.reached(Progress(returned, elapsed, predicted)):
                    return self._responses(returned, elapsed)
            elif over:
                responses = self._responses(returned, elapsed)
                raise NotEnoughAnswers(_shortfall(responses, time_limit), responses)
            elif not hope:
                # Workers that are being started may still be in time.
                with self._changed:
                    if not self._hope and self.returned.sum() == seen and self._failure is None:
                        self._changed.wait(max(0.0, time_limit - elapsed))

    def _responses(self, returned, elapsed):
        return Responses(
            # Rows that come later are written to arrays of which nobody reads these.
            values=self._values,
            returned=returned,
            latency=np.where(returned, self._latency, np.inf),
            faults=tuple(self.faults),
            seconds=elapsed,
        )


def _shortfall(responses, time_limit):
    faults = "; ".join(f"worker {fault.worker} {fault.kind}: {fault.message}" for fault in responses.faults[:3])
    return (
        f"{responses.returned.sum()} of {len(responses.returned)} answers came within {time_limit:.3g} s, too few to "
        f"decode{'; ' + faults if faults else ''}"
    )
