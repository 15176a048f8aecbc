"""Starts workers, detects those that died or are stuck, and restarts them: for threads and for Ray actors alike."""

import abc
import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, final

from .event_loop import EventLoop, failed_future, post_when_done

log = logging.getLogger("jaxcode.pools")

State = Literal["starting", "idle", "busy", "quarantined"]
STATES: tuple[State, ...] = ("idle", "busy", "starting", "quarantined")

# Failures in a row after which a worker is quarantined, and the backoff in seconds, which doubles with each further. A
# lower limit would quarantine healthy workers for a single fault; a higher one lets a broken worker delay more shares.
_MAX_FAILURES = 3
_MIN_BACKOFF, _MAX_BACKOFF = 0.5, 60.0
# Seconds between two checks for workers that are stuck.
_CHECK_INTERVAL = 0.5
# Seconds that workers have to end when the pool is closed.
_CLOSE_LIMIT = 2.0


class WorkerDied(Exception):
    """Raised when a worker cannot answer any more."""


class AbstractProcess(abc.ABC):
    """Runs a process, a thread or an actor that can be ended and restarted. No method blocks but `join`."""

    @abc.abstractmethod
    def start(self) -> None:
        """Starts a new process and ends the previous one, if there is one.

        Raises:
            WorkerDied: If it cannot be started.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Ends it, by force where that is possible. Ending it twice does nothing more."""

    @abc.abstractmethod
    def join(self, seconds: float) -> None:
        """Waits for its end, at most the given number of seconds."""


@final
class Slot:
    """Holds the state of one worker, over all processes that run it in turn.

    Attributes:
        number: Index of the worker.
        process: The process, thread or actor that runs the worker.
        state: One of `STATES`.
        failures: How often it has failed since it last succeeded.
    """

    def __init__(self, number: int, process: AbstractProcess):
        self.number, self.process = number, process
        self.state: State = "starting"
        self.failures = 0
        self._call_start = time.monotonic()
        # Number of the current call: the outcome of an earlier one, which was given up, is ignored.
        self._call_number = 0
        self._on_outcome: Callable[[Slot, Future], object] | None = None


@final
class Supervisor:
    """Starts workers, restarts those that died or are stuck, and quarantines those that keep failing.

    All methods but `states` and `counters` are to be called on the loop's thread, and all callbacks run there.

    Args:
        loop: The event loop on whose thread all decisions are made.
        processes: One for each worker, not started.
        prepare: Called with a slot whose process has just been started; returns a future that is done when the worker
            is ready.
        on_ready: Called with the slot, then idle, and that future's result.
        on_death: Called with the slot and the reason when a worker has died, is stuck or could not get ready.
        on_change: Called after the states of slots have changed: idle ones may be called then.
        stuck_after: Seconds after which a worker that has not answered a call is replaced; None for never.
        start_limit: Seconds that a worker may take to start and get ready.
    """

    def __init__(
        self,
        loop: EventLoop,
        processes: Sequence[AbstractProcess],
        *,
        prepare: Callable[[Slot], Future],
        on_ready: Callable[[Slot, Any], object],
        on_death: Callable[[Slot, Exception], object],
        on_change: Callable[[], object],
        stuck_after: float | None,
        start_limit: float,
    ):
        self._loop = loop
        self.slots = tuple(Slot(number, process) for number, process in enumerate(processes))
        self._prepare, self._on_ready, self._on_death, self._on_change = prepare, on_ready, on_death, on_change
        self._stuck_after, self._start_limit = stuck_after, start_limit
        self._counters = {"deaths": 0, "restarts": 0, "quarantines": 0}

    def states(self) -> list[str]:
        """Returns the state of every worker; may be called from any thread."""
        return [slot.state for slot in self.slots]

    def counters(self) -> dict[str, int]:
        """Returns how often workers died, were restarted and were quarantined; may be called from any thread."""
        return dict(self._counters)

    def idle(self) -> list[Slot]:
        """Returns the slots that may be called."""
        return [slot for slot in self.slots if slot.state == "idle"]

    def start(self) -> None:
        """Starts all workers."""
        for slot in self.slots:
            self._start(slot)
        self._check_stuck()

    def call(self, slot: Slot, submit: Callable[[], Future], on_outcome: Callable[[Slot, Future], object]) -> None:
        """Starts a call on an idle worker.

        Args:
            slot: The slot of the worker.
            submit: Starts the work and returns its future, which raises `WorkerDied` where the worker is dead.
            on_outcome: Called with the slot and the future when it is done; where the worker died or is stuck, with a
                future that raises `WorkerDied`.
        """
        assert slot.state == "idle", slot.state
        self._begin(slot, "busy", submit, on_outcome)

    def record_success(self, slot: Slot) -> None:
        """Resets the worker's count of failures, after a success."""
        slot.failures = 0

    def record_failure(self, slot: Slot) -> None:
        """Counts a failure at what others can do: after several in a row the worker is quarantined and restarted."""
        slot.failures += 1
        if slot.state == "idle":
            self._release(slot)

    def close(self) -> None:
        """Ends all workers; no method may be called afterwards."""
        for slot in self.slots:
            slot._call_number += 1
            self._end_process(slot)
        end = time.monotonic() + _CLOSE_LIMIT
        for slot in self.slots:
            slot.process.join(max(0.0, end - time.monotonic()))

    def _begin(self, slot, state, submit, on_outcome):
        slot._call_number += 1
        slot.state, slot._call_start, slot._on_outcome = state, time.monotonic(), on_outcome
        try:
            future = submit()
        except Exception as failure:
            future = failed_future(WorkerDied(str(failure)))
        post_when_done(future, self._loop, functools.partial(self._finish, slot, slot._call_number))

    def _finish(self, slot, call_number, future):
        if call_number != slot._call_number:
            return
        slot._call_number += 1
        on_outcome, slot._on_outcome = slot._on_outcome, None
        try:
            on_outcome(slot, future)
        finally:
            failure = future.exception()
            if isinstance(failure, WorkerDied):
                self._replace_dead(slot, failure)
            elif slot.state == "busy":
                self._release(slot)
        self._on_change()

    def _release(self, slot):
        if slot.failures >= _MAX_FAILURES:
            self._quarantine(slot)
        else:
            slot.state = "idle"

    def _start(self, slot):
        def submit():
            slot.process.start()
            return self._prepare(slot)

        self._begin(slot, "starting", submit, self._on_prepared)

    def _on_prepared(self, slot, future):
        failure = future.exception()
        if failure is None:
            slot.state = "idle"
            self._on_ready(slot, future.result())
        elif not isinstance(failure, WorkerDied):
            self._replace_dead(slot, WorkerDied(f"it could not get ready: {type(failure).__name__}: {failure}"))

    def _replace_dead(self, slot, failure):
        """Ends what may be left of a dead worker, and restarts it: at once, or after a backoff if it keeps dying."""
        self._counters["deaths"] += 1
        log.warning("worker %d died: %s", slot.number, failure, extra={"worker": slot.number, "kind": "died"})
        self._end_process(slot)
        slot.failures += 1
        self._on_death(slot, failure)
        if slot.failures >= _MAX_FAILURES:
            self._quarantine(slot)
        else:
            self._restart(slot)

    def _quarantine(self, slot):
        slot.state = "quarantined"
        self._counters["quarantines"] += 1
        seconds = min(_MIN_BACKOFF * 2.0 ** min(slot.failures - _MAX_FAILURES, 30), _MAX_BACKOFF)
        log.warning(
            "worker %d failed %d times in a row and is started again in %.1f s",
            slot.number,
            slot.failures,
            seconds,
            extra={"worker": slot.number, "kind": "quarantined"},
        )
        self._loop.call_later(seconds, functools.partial(self._restart, slot))

    def _restart(self, slot):
        # A worker that raises where others do not may run in a broken process, so it gets a new one.
        self._counters["restarts"] += 1
        self._start(slot)
        self._on_change()

    def _check_stuck(self):
        for slot in self.slots:
            limit = {"busy": self._stuck_after, "starting": self._start_limit}.get(slot.state)
            if limit is not None and time.monotonic() - slot._call_start > limit:
                failure = WorkerDied(f"it did not answer for {limit} s and was given up")
                self._finish(slot, slot._call_number, failed_future(failure))
        self._loop.call_later(_CHECK_INTERVAL, self._check_stuck)

    def _end_process(self, slot):
        try:
            slot.process.close()
        except Exception:
            log.exception("worker %d could not be ended", slot.number)
