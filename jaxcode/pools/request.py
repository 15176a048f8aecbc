"""Tracks one request to a pool: its shares, the answers that came, and when waiting ends."""

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
from .responses import CanDecode, Fault, NotEnoughAnswers, PredictedError, Responses, Worth

# When a request can make progress: "soon", as shares are being computed or can be assigned; "later", as a worker must
# be restarted first; "never", as no share is left that could still be answered.
Outlook = Literal["soon", "later", "never"]

# A share that failed, or whose answer is overdue, is assigned once more, and no further.
_MAX_ATTEMPTS = 2


@final
class Request:
    """Tracks the shares of one request, each to be computed by some worker, see `AbstractPool`.

    Shares are assigned and answers accepted on the scheduler's thread, while another thread waits in `gather`.

    Args:
        shares: Leaves (shares, batch, ...).
        signature: Shapes and dtypes of one share's batch and of its answer.
        order: The numbers of these shares, in the order in which they are assigned.
        num_more: How many shares are added later.
        again_after: Seconds after which a share that has no answer is assigned once more; None for never.
        worth: Which of these shares come first, as for `AbstractPool`.
        start_time: Monotonic time at which the request was made, in seconds; that of the call if None.

    Attributes:
        returned: Which shares have a valid answer, bool, shape (shares,).
        faults: The faults of workers, in the order in which they happened.
        compiling_workers: Workers that compile for this request.
        in_flight: How many workers compute a share of it.
        is_complete: Whether it has all its shares.
        is_finished: Whether no thread waits for it any more.
    """

    def __init__(
        self,
        shares: PyTree[np.ndarray],
        signature: Signature,
        order: Sequence[int],
        num_more: int = 0,
        again_after: float | None = None,
        worth: Worth | None = None,
        start_time: float | None = None,
    ):
        num_shares = len(order) + num_more
        self.signature = signature
        self._batches = _split(shares)
        self.again_after, self._worth = again_after, worth
        self.returned = np.zeros(num_shares, bool)
        self.faults: list[Fault] = []
        self.compiling_workers: set[int] = set()
        self.in_flight = 0
        self.is_complete = num_more == 0
        self.is_finished = False
        self._values = jax.tree.map(lambda leaf: np.zeros((num_shares, *leaf.shape), leaf.dtype), signature.answers)
        self._latency = np.full(num_shares, np.inf)
        self._worker = np.full(num_shares, -1)
        self._queue = collections.deque(int(share) for share in order)
        self._attempts = np.zeros(num_shares, int)
        self._assigned_at = np.full(num_shares, np.inf)
        # A worker that failed at a share is assigned no other share, or one broken worker would fail at all of them.
        self._failed_workers: set[int] = set()
        # Pairs (worker, share).
        self._failures: list[tuple[int, int]] = []
        self._start_time = time.monotonic() if start_time is None else start_time
        self._failure: Exception | None = None
        self._outlook: Outlook = "soon"
        # Incremented whenever `gather` must evaluate the stop policy again.
        self._version = 0
        self._changed = threading.Condition()

    # ---- on the scheduler's thread -------------------------------------------------------------------------

    @property
    def has_queued_shares(self) -> bool:
        """Returns whether there are shares to be assigned."""
        return bool(self._queue)

    def is_allowed(self, worker: int) -> bool:
        """Returns whether shares may be assigned to this worker."""
        return worker not in self._failed_workers

    def allow(self, worker: int) -> None:
        """Allows shares to be assigned to this worker again, as its process is a new one."""
        self._failed_workers.discard(worker)

    def take(self, worker: int) -> int | None:
        """Takes the next share for this worker from the queue; None if there is none that it may have."""
        if self.is_finished or not self._queue or worker in self._failed_workers:
            return None
        while self._queue:
            share = self._queue.popleft()
            if not self.returned[share]:
                self.record_assignment(share)
                return share
        return None

    def overdue_shares(self) -> list[int]:
        """Returns the shares whose answers are overdue, those worth most first.

        Those worth the same, as all are if nothing tells, come in the order in which they were assigned.
        """
        if self.is_finished or self.again_after is None:
            return []
        latest_assignment = time.monotonic() - self.again_after
        is_overdue = ~self.returned & (self._attempts < _MAX_ATTEMPTS) & (self._assigned_at <= latest_assignment)
        is_overdue[list(self._queue)] = False
        if not is_overdue.any():
            return []
        worth = np.ones(len(is_overdue)) if self._worth is None else self._worth(self.returned)
        shares = np.flatnonzero(is_overdue)
        return shares[np.lexsort((self._assigned_at[shares], -worth[shares]))].tolist()

    def add(self, shares: PyTree[np.ndarray]) -> None:
        """Adds the shares that are missing, leaves (missing, batch, ...), behind those that are queued."""
        first = len(self._batches)
        self._batches += _split(shares)
        self._queue.extend(range(first, len(self._batches)))
        self.is_complete = True

    def record_assignment(self, share: int) -> None:
        """Records that a share has been assigned to a worker."""
        self._attempts[share] += 1
        self._assigned_at[share] = time.monotonic()
        self.in_flight += 1

    def batch(self, share: int) -> PyTree[np.ndarray]:
        """Returns the batch of a share, leaves (batch, ...)."""
        return self._batches[share]

    def is_late(self, share: int) -> bool:
        """Returns whether an answer to this share would be late: it has one, or no thread waits for the request."""
        return self.is_finished or bool(self.returned[share])

    def accept(self, share: int, answer: PyTree[np.ndarray], worker: int) -> None:
        """Stores a worker's valid answer, unless it is late."""
        self.in_flight -= 1
        with self._changed:
            if self.is_late(share):
                return
            for rows, leaf in zip(jax.tree.leaves(self._values), jax.tree.leaves(answer), strict=True):
                rows[share] = leaf
            self._latency[share] = time.monotonic() - self._start_time
            self._worker[share] = worker
            self.returned[share] = True
            self._notify()

    def record_fault(self, share: int, fault: Fault) -> None:
        """Records a fault and queues the share for another worker, unless all attempts are used."""
        self.in_flight -= 1
        self.faults.append(fault)
        if fault.kind != "died":
            # A dead worker is replaced by a new process, which may compute other shares.
            self._failed_workers.add(fault.worker)
            self._failures.append((fault.worker, share))
        if not self.returned[share] and self._attempts[share] < _MAX_ATTEMPTS:
            self._queue.appendleft(share)

    def faulty_workers(self) -> set[int]:
        """Finds the workers whose failures are their own fault and not the request's.

        A worker that failed at a share is faulty if another worker answered it, or if no other worker failed at it and
        other shares were answered. If several workers failed at a share and none answered it, f cannot be computed on
        it, and none of them is faulty.
        """
        workers_by_share = collections.defaultdict(set)
        for worker, share in self._failures:
            workers_by_share[share].add(worker)
        return {
            worker
            for worker, share in self._failures
            if self.returned[share] or (len(workers_by_share[share]) == 1 and self.returned.any())
        }

    def set_outlook(self, outlook: Outlook) -> None:
        """Stores when the request can make progress, and notifies the thread that waits if that has changed."""
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
        """Marks the request as finished: answers that come afterwards are late."""
        with self._changed:
            self.is_finished = True

    def _notify(self):
        self._version += 1
        self._changed.notify_all()

    # ---- on the thread that waits --------------------------------------------------------------------------

    def gather(
        self, stop: AbstractStop, time_limit: float, can_decode: CanDecode, error: PredictedError | None
    ) -> Responses:
        """Waits until the stop policy is met; arguments, result and errors as for `AbstractPool.run`."""
        moments = (*stop.moments(), time_limit)
        version = -1
        while True:
            with self._changed:
                elapsed = time.monotonic() - self._start_time
                waits = [moment - elapsed for moment in moments if moment > elapsed]
                if self._version == version and waits:
                    self._changed.wait(min(waits))
                version, outlook, failure = self._version, self._outlook, self._failure
                returned = self.returned.copy()
            if failure is not None:
                raise failure
            elapsed = time.monotonic() - self._start_time
            out_of_time = elapsed >= time_limit
            if can_decode(returned):
                predicted_error = (
                    None if error is None else functools.cache(functools.partial(error, self._values, returned))
                )
                progress = Progress(returned, elapsed, predicted_error)
                if out_of_time or outlook != "soon" or stop.reached(progress):
                    return self._responses(returned, elapsed)
            elif out_of_time or outlook == "never":
                responses = self._responses(returned, elapsed)
                raise NotEnoughAnswers(self._describe_shortage(responses, time_limit, out_of_time), responses)

    def _responses(self, returned, elapsed):
        self.finish()
        # Answers that came after `returned` was read are not part of the responses.
        for share in np.flatnonzero(self.returned & ~returned):
            for rows in jax.tree.leaves(self._values):
                rows[share] = 0
        return Responses(
            values=self._values,
            returned=returned,
            latency=np.where(returned, self._latency, np.inf),
            worker=np.where(returned, self._worker, -1),
            faults=tuple(self.faults),
            seconds=elapsed,
        )

    def _describe_shortage(self, responses, time_limit, out_of_time):
        """Says how many answers came, why no more did, and the first faults."""
        returned = responses.returned
        reason = f"within {time_limit:.3g} s" if out_of_time else "and no worker is left that could compute the others"
        parts = [f"{returned.sum()} of {len(returned)} answers came {reason}, too few to decode"]
        if num_compiling := len(self.compiling_workers):
            parts.append(
                f"{num_compiling} workers were still compiling for batches of this shape: call warm_up beforehand, or "
                "allow more time"
            )
        parts += [f"worker {fault.worker} {fault.kind}: {fault.message}" for fault in responses.faults[:3]]
        return "; ".join(parts)


def _split(shares):
    """Returns the batches of shares, leaves (shares, batch, ...), as a list."""
    leaves, structure = jax.tree.flatten(shares)
    return [jax.tree.unflatten(structure, batches) for batches in zip(*leaves, strict=True)]
