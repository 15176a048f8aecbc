"""One request to a pool: its shares, the answers that came, and when waiting ends."""

import collections
import functools
import threading
import time
from collections.abc import Sequence
from typing import Literal, final

import jax
import numpy as np
from jaxtyping import PyTree

from ..stop import AbstractStop, Progress
from .compute import Signature
from .responses import Enough, Fault, NotEnoughAnswers, PredictedError, Responses

# Whether a request can make progress: work is under way or can be assigned; a worker must be started before; or nobody
# is left who could answer.
Outlook = Literal["soon", "later", "never"]

# A share that went wrong, or whose answer is overdue, is assigned once more, not for ever.
_MAX_ATTEMPTS = 2


@final
class Request:
    """Shares of coded inputs, each to be computed by some worker.

    Shares are assigned and answers accepted on the scheduler's thread, while another thread waits in `gather`.

    Args:
        shares: Leaves (shares, batch, ...).
        signature: Shapes and dtypes of one share's batch and of its answer.
        order: In which order shares are assigned.
        again_after: Seconds after which a share that has no answer is assigned once more; None for never.
        began: Monotonic time at which the request was made, in seconds; now if None.

    Attributes:
        returned: To which shares answers came, bool, shape (shares,).
        faults: What went wrong.
        compiling: Workers that compile for this request.
        in_flight: How many workers compute a share of it.
        finished: Whether nobody waits for it any more.
    """

    def __init__(
        self,
        shares: PyTree[np.ndarray],
        signature: Signature,
        order: Sequence[int],
        again_after: float | None = None,
        began: float | None = None,
    ):
        number = len(order)
        self._shares, self.signature = shares, signature
        self.again_after = again_after
        self.returned = np.zeros(number, bool)
        self.faults: list[Fault] = []
        self.compiling: set[int] = set()
        self.in_flight = 0
        self.finished = False
        self._values = jax.tree.map(lambda leaf: np.zeros((number, *leaf.shape), leaf.dtype), signature.answers)
        self._latency = np.full(number, np.inf)
        self._queued = collections.deque(int(share) for share in order)
        self._attempts = np.zeros(number, int)
        self._assigned_at = np.full(number, np.inf)
        # A worker that failed at a share is assigned no other, or one broken worker would fail at all shares.
        self._failed: set[int] = set()
        # Who failed at which share, and who answered it.
        self._failures: list[tuple[int, int]] = []
        self._answered_by = np.full(number, -1)
        self._began = time.monotonic() if began is None else began
        self._failure: Exception | None = None
        self._outlook: Outlook = "soon"
        # Counts what `gather` has to look at.
        self._version = 0
        self._changed = threading.Condition()

    # ---- on the scheduler's thread -------------------------------------------------------------------------

    @property
    def has_queued(self) -> bool:
        """Whether there are shares to be assigned."""
        return bool(self._queued)

    def may_ask(self, worker: int) -> bool:
        """Whether shares may be assigned to this worker."""
        return worker not in self._failed

    def allow(self, worker: int) -> None:
        """Shares may be assigned to this worker again, as its process is a new one."""
        self._failed.discard(worker)

    def take(self, worker: int) -> int | None:
        """Takes the next share for this worker from the queue, if there is one that it may have."""
        if self.finished or not self._queued or worker in self._failed:
            return None
        while self._queued:
            share = self._queued.popleft()
            if not self.returned[share]:
                self.note_assigned(share)
                return share
        return None

    def overdue(self) -> list[int]:
        """Shares that have waited too long for their answer, those that have waited longest first."""
        if self.finished or self.again_after is None:
            return []
        assigned_before = time.monotonic() - self.again_after
        overdue = ~self.returned & (self._attempts < _MAX_ATTEMPTS) & (self._assigned_at <= assigned_before)
        overdue[list(self._queued)] = False
        shares = np.flatnonzero(overdue)
        return shares[np.argsort(self._assigned_at[shares], kind="stable")].tolist()

    def note_assigned(self, share: int) -> None:
        """Notes that the share has been assigned to a worker."""
        self._attempts[share] += 1
        self._assigned_at[share] = time.monotonic()
        self.in_flight += 1

    def batch(self, share: int) -> PyTree[np.ndarray]:
        """The coded inputs of a share."""
        return jax.tree.map(lambda leaf: leaf[share], self._shares)

    def is_answered(self, share: int) -> bool:
        """Whether nobody waits for this share any more."""
        return self.finished or bool(self.returned[share])

    def accept(self, share: int, worker: int, answer: PyTree[np.ndarray]) -> None:
        """Keeps an answer, unless it is late."""
        self.in_flight -= 1
        with self._changed:
            if self.is_answered(share):
                return
            for rows, leaf in zip(jax.tree.leaves(self._values), jax.tree.leaves(answer), strict=True):
                rows[share] = leaf
            self._latency[share] = time.monotonic() - self._began
            self._answered_by[share] = worker
            self.returned[share] = True
            self._notify()

    def reject(self, share: int, fault: Fault) -> None:
        """Notes that the share went wrong with a worker; another may have it."""
        self.in_flight -= 1
        self.faults.append(fault)
        if fault.kind != "died":
            # A worker that died will be another process, which may compute what is left.
            self._failed.add(fault.worker)
            self._failures.append((fault.worker, share))
        if not self.returned[share] and self._attempts[share] < _MAX_ATTEMPTS:
            self._queued.appendleft(share)

    def blamed(self) -> set[int]:
        """Workers that failed at what others can do.

        A share that was answered by another worker, or that nobody else tried while other shares were answered, is the
        worker's failure. A share at which every worker failed that tried it is the request's own.
        """
        failures = {share: {w for w, s in self._failures if s == share} for _, share in self._failures}
        return {
            worker
            for worker, share in self._failures
            if self.returned[share] or (len(failures[share]) == 1 and self.returned.any())
        }

    def set_progress(self, outlook: Outlook) -> None:
        """Notifies the thread that waits whether somebody may answer."""
        if outlook != self._outlook:
            with self._changed:
                self._outlook = outlook
                self._notify()

    def fail(self, failure: Exception) -> None:
        """Ends the request with an exception."""
        with self._changed:
            self._failure = failure
            self._notify()

    def finish(self) -> None:
        """Nobody waits any more: answers that come are late."""
        with self._changed:
            self.finished = True

    def _notify(self):
        self._version += 1
        self._changed.notify_all()

    # ---- on the thread that waits --------------------------------------------------------------------------

    def gather(self, stop: AbstractStop, time_limit: float, enough: Enough, error: PredictedError | None) -> Responses:
        """Waits until answers are enough, as `AbstractPool.run`."""
        moments = (*stop.moments(), time_limit)
        version = -1
        while True:
            with self._changed:
                elapsed = time.monotonic() - self._began
                pending = [moment - elapsed for moment in moments if moment > elapsed]
                if self._version == version and pending:
                    self._changed.wait(min(pending))
                version, outlook, failure = self._version, self._outlook, self._failure
                returned = self.returned.copy()
            if failure is not None:
                raise failure
            elapsed = time.monotonic() - self._began
            out_of_time = elapsed >= time_limit
            if enough(returned):
                predicted = None if error is None else functools.cache(functools.partial(error, self._values, returned))
                progress = Progress(returned, elapsed, predicted)
                if out_of_time or outlook != "soon" or stop.reached(progress):
                    return self._responses(returned, elapsed)
            elif out_of_time or outlook == "never":
                responses = self._responses(returned, elapsed)
                raise NotEnoughAnswers(self._shortfall(responses, time_limit, out_of_time), responses)

    def _responses(self, returned, elapsed):
        self.finish()
        # Answers that came since `returned` was read are not part of what is returned.
        for share in np.flatnonzero(self.returned & ~returned):
            for rows in jax.tree.leaves(self._values):
                rows[share] = 0
        return Responses(
            values=self._values,
            returned=returned,
            latency=np.where(returned, self._latency, np.inf),
            faults=tuple(self.faults),
            seconds=elapsed,
        )

    def _shortfall(self, responses, time_limit, out_of_time):
        returned = responses.returned
        reason = f"within {time_limit:.3g} s" if out_of_time else "and no worker is left that could compute the others"
        parts = [f"{returned.sum()} of {len(returned)} answers came {reason}, too few to decode"]
        if compiling := len(self.compiling):
            parts.append(
                f"{compiling} workers were still compiling for batches of this shape: call warm_up beforehand, or "
                "allow more time"
            )
        parts += [f"worker {fault.worker} {fault.kind}: {fault.message}" for fault in responses.faults[:3]]
        return "; ".join(parts)
