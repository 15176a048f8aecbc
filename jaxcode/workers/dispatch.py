"""The host's side of a pool: who gets what to do, what became of it, and who rests.

All decisions are made by one thread, which takes up events one after the other: a request, an answer, a death, an
alarm. What takes long happens elsewhere: in workers, and in the threads that wait for their requests.
"""

import abc
import collections
import functools
import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import jax
import numpy as np
from jaxtyping import Bool, PyTree

from ..stop import AbstractStop, Progress
from .compute import refusal
from .responses import Enough, Fault, NotEnoughAnswers, PoolClosed, PredictedError, Responses

log = logging.getLogger("jaxcode.workers")
log.addHandler(logging.NullHandler())

# Failures in a row after which a worker rests, and for how many seconds, doubled from one rest to the next.
_PATIENT_WITH = 3
_SHORTEST_REST, _LONGEST_REST = 0.5, 60.0
# Seconds from one look for workers that do not answer to the next.
_LOOK_EVERY = 0.5
_COUNTED = ("answers", "late", "raised", "refused", "deaths", "restarts", "rests")
# A request that a worker died of is given to it once more, not for ever.
_ATTEMPTS = 2


class WorkerDied(Exception):
    """The worker cannot answer any more."""


class AbstractWorker(abc.ABC):
    """One worker, seen from the host. No method blocks; what they return is done when the worker is."""

    @abc.abstractmethod
    def start(self, examples: list[PyTree[jax.ShapeDtypeStruct]]) -> Future:
        """Starts it, again if it ran before, and has it compile for the examples."""

    @abc.abstractmethod
    def call(self, batch: PyTree[np.ndarray]) -> Future:
        """Its answer to a batch. The future raises `WorkerDied` where it is dead, else what it raised."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends it."""


class _Seat:
    """A worker's place in the pool."""

    def __init__(self, number: int, worker: AbstractWorker):
        self.number, self.worker = number, worker
        self.state = "starting"
        self.failures = 0
        self.request: _Request | None = None
        self.since = time.monotonic()
        # Outcomes of calls that were given up have another number.
        self.call = 0


class _Request:
    def __init__(self, batches, expected, only):
        num_workers = len(only)
        self.batches, self.expected, self.only = batches, expected, only
        self.values = jax.tree.map(lambda leaf: np.zeros((num_workers, *leaf.shape), leaf.dtype), expected)
        self.returned = np.zeros(num_workers, bool)
        self.latency = np.full(num_workers, np.inf)
        self.attempts = np.zeros(num_workers, int)
        self.faults: list[Fault] = []
        self.began = time.monotonic()
        self.finished = False
        self.failure: Exception | None = None
        # Whether somebody who has not answered yet may soon.
        self.hope = True
        self.changed = threading.Condition()

    def batch(self, worker):
        return jax.tree.map(lambda leaf: leaf[worker], self.batches)

    def wants(self, seat):
        n = seat.number
        return self.only[n] and not self.finished and not self.returned[n] and self.attempts[n] == 0

    def accept(self, worker, answer):
        """Keeps an answer, or says why not."""
        problem = refusal(answer, self.expected)
        if problem is None:
            for row, leaf in zip(jax.tree.leaves(self.values), jax.tree.leaves(answer), strict=True):
                row[worker] = leaf
            with self.changed:
                self.latency[worker] = time.monotonic() - self.began
                self.returned[worker] = True
                self.changed.notify_all()
        return problem


class Dispatcher:
    """Keeps workers going and gathers their answers.

    Args:
        workers: Not started yet.
        stuck_after: Seconds after which a worker that has not answered a call is taken for dead; None for never.
        start_limit: Seconds that a worker may take to start.
    """

    def __init__(self, workers: Sequence[AbstractWorker], *, stuck_after: float | None, start_limit: float):
        self._seats = [_Seat(number, worker) for number, worker in enumerate(workers)]
        self._stuck_after, self._start_limit = stuck_after, start_limit
        self._examples: list[PyTree[jax.ShapeDtypeStruct]] = []
        self._open: list[_Request] = []
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._alarms: list[tuple[float, int, Callable[[], None]]] = []
        self._tie = itertools.count()
        self._closed = False
        self._counters: dict[str, int] = dict.fromkeys(_COUNTED, 0)
        self._thread = threading.Thread(target=self._loop, name="jaxcode dispatcher", daemon=True)
        self._thread.start()

    # ---- called from any thread ----------------------------------------------------------------------------

    def start(self, examples: list[PyTree[jax.ShapeDtypeStruct]], on_ready: Callable[[], object]) -> None:
        """Starts all workers and waits for them; those that take too long go on starting in the background.

        Raises:
            RuntimeError: If none can be started.
        """
        done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._examples = list(examples)
        self._events.put(self._look_for_stuck)
        self._events.put(lambda: self._start_all(done.put))
        end, problem, ready = time.monotonic() + self._start_limit, None, 0
        for _ in self._seats:
            try:
                failure = done.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            problem, ready = failure or problem, ready + (failure is None)
            on_ready()
        if not ready:
            self.close()
            raise RuntimeError(f"no worker could be started within {self._start_limit} s") from problem

    def run(
        self,
        batches: PyTree[np.ndarray],
        expected: PyTree[jax.ShapeDtypeStruct],
        only: Bool[np.ndarray, "workers"],
        stop: AbstractStop,
        time_limit: float,
        enough: Enough,
        error: PredictedError | None,
    ) -> Responses:
        """As `AbstractPool.run`; expected is what one worker's answer looks like."""
        request = _Request(batches, expected, only)
        self._events.put(functools.partial(self._on_request, request))
        if self._closed:
            raise PoolClosed("the pool is closed")
        try:
            return self._gather(request, stop, time_limit, enough, error)
        finally:
            request.finished = True
            self._events.put(functools.partial(self._on_finished, request))

    def add_example(self, shapes: PyTree[jax.ShapeDtypeStruct]) -> None:
        """Has workers that are started from now on compile for such batches too."""
        if shapes not in self._examples:
            self._examples = [*self._examples, shapes]

    def states(self) -> list[str]:
        return [seat.state for seat in self._seats]

    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._events.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10.0)

    def _gather(self, request, stop, time_limit, enough, error):
        moments = (*stop.moments(), time_limit)
        seen = -1
        while True:
            with request.changed:
                elapsed = time.monotonic() - request.began
                pending = [moment - elapsed for moment in moments if moment > elapsed]
                if request.returned.sum() == seen and request.hope and request.failure is None and pending:
                    request.changed.wait(min(pending))
                returned, hope = request.returned.copy(), request.hope
            if request.failure is not None:
                raise request.failure
            seen, elapsed = returned.sum(), time.monotonic() - request.began
            over = elapsed >= time_limit
            if enough(returned):
                predicted = None if error is None else functools.cache(lambda: error(request.values, returned))  # noqa: B023
                if over or not hope or stop.reached(Progress(returned, elapsed, predicted)):
                    return self._responses(request, returned, elapsed)
            elif over:
                responses = self._responses(request, returned, elapsed)
                raise NotEnoughAnswers(self._shortfall(responses, time_limit), responses)
            elif not hope:
                # Those that are being started may still be in time.
                with request.changed:
                    if not request.hope and request.returned.sum() == seen and request.failure is None:
                        request.changed.wait(max(0.0, time_limit - elapsed))

    def _responses(self, request, returned, elapsed):
        return Responses(
            # Rows that come later are written to arrays that nobody reads.
            values=request.values,
            returned=returned,
            latency=np.where(returned, request.latency, np.inf),
            faults=tuple(request.faults),
            seconds=elapsed,
        )

    def _shortfall(self, responses, time_limit):
        states = ", ".join(f"{count} {state}" for state, count in collections.Counter(self.states()).items())
        faults = "; ".join(f"worker {fault.worker} {fault.kind}: {fault.message}" for fault in responses.faults[:3])
        return (
            f"{responses.returned.sum()} of {len(self._seats)} workers answered within {time_limit} s, too few "
            f"to decode (workers now: {states}){'; ' + faults if faults else ''}"
        )

    # ---- the dispatcher's own thread -----------------------------------------------------------------------

    def _loop(self):
        while not self._closed:
            try:
                self._next_event()()
            except Exception:
                log.exception("an event could not be handled")
        for request in self._open:
            self._fail(request)
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, functools.partial) and event.func == self._on_request:
                self._fail(event.args[0])
        for seat in self._seats:
            try:
                seat.worker.close()
            except Exception:
                log.exception("worker %d could not be closed", seat.number)

    def _next_event(self):
        """What is due, else what comes first."""
        wait = self._alarms[0][0] - time.monotonic() if self._alarms else None
        if wait is None or wait > 0:
            try:
                return self._events.get(timeout=wait)
            except queue.Empty:
                pass
        return heapq.heappop(self._alarms)[2]

    def _fail(self, request):
        with request.changed:
            request.failure = PoolClosed("the pool was closed during the request")
            request.changed.notify_all()

    def _after(self, seconds, event):
        heapq.heappush(self._alarms, (time.monotonic() + seconds, next(self._tie), event))

    def _on_request(self, request):
        self._open.append(request)
        for seat in self._seats:
            if seat.state == "idle" and request.wants(seat):
                self._send(seat, request)
        self._look_ahead()

    def _on_finished(self, request):
        if request in self._open:
            self._open.remove(request)
        for number in {fault.worker for fault in request.faults if fault.kind != "died"}:
            seat = self._seats[number]
            self._blame(seat, request)
            if seat.state == "idle":
                self._next(seat)

    def _send(self, seat, request):
        seat.state, seat.request = "busy", request
        request.attempts[seat.number] += 1
        self._begin(seat, lambda: seat.worker.call(request.batch(seat.number)), self._on_answer)

    def _begin(self, seat, begin, then):
        seat.call += 1
        seat.since = time.monotonic()
        call = seat.call
        try:
            future = begin()
        except Exception as failure:
            future = Future()
            future.set_exception(WorkerDied(str(failure)))
        future.add_done_callback(lambda future: self._events.put(functools.partial(then, seat, call, future)))

    def _on_answer(self, seat, call, future):
        if call != seat.call:
            return
        request, failure = seat.request, future.exception()
        seat.request = None
        if isinstance(failure, WorkerDied):
            self._on_death(seat, request, str(failure))
            return
        late, problem = request.finished, None
        if failure is not None:
            self._fault(seat, request, "raised", f"{type(failure).__name__}: {failure}")
        else:
            answer = future.result()
            problem = refusal(answer, request.expected) if late else request.accept(seat.number, answer)
            if problem is not None:
                self._fault(seat, request, "refused", problem)
        if failure is None and problem is None:
            self._counters["late" if late else "answers"] += 1
            seat.failures = 0
        elif late:
            self._blame(seat, request)
        self._next(seat)
        self._look_ahead()

    def _blame(self, seat, request):
        """A worker that failed where others did not; where all did, the request is to blame."""
        seat.failures += bool(request.returned.any())

    def _fault(self, seat, request, kind, message):
        self._counters["deaths" if kind == "died" else kind] += 1
        log.warning("worker %d %s: %s", seat.number, kind, message, extra={"worker": seat.number, "kind": kind})
        if request is not None:
            request.faults.append(Fault(seat.number, kind, message))

    def _on_death(self, seat, request, message):
        self._fault(seat, request, "died", message)
        seat.failures += 1
        if request is not None and request.attempts[seat.number] < _ATTEMPTS:
            request.attempts[seat.number] = 0
        if seat.failures >= _PATIENT_WITH:
            self._rest(seat, self._restart)
        else:
            self._restart(seat)
        self._look_ahead()

    def _look_for_stuck(self):
        for seat in self._seats:
            limit = {"busy": self._stuck_after, "starting": self._start_limit}.get(seat.state)
            if limit is not None and time.monotonic() - seat.since > limit:
                seat.call += 1
                request, seat.request = seat.request, None
                self._on_death(seat, request, f"it did not answer for {limit} s and was given up")
        self._after(_LOOK_EVERY, self._look_for_stuck)

    def _rest(self, seat, then):
        seat.state = "resting"
        self._counters["rests"] += 1
        seconds = min(_SHORTEST_REST * 2 ** (seat.failures - _PATIENT_WITH), _LONGEST_REST)
        log.warning("worker %d rests for %.1f s", seat.number, seconds, extra={"worker": seat.number, "kind": "rests"})
        self._after(seconds, functools.partial(then, seat))

    def _back_from_rest(self, seat):
        self._take_up(seat)
        self._look_ahead()

    def _restart(self, seat):
        self._counters["restarts"] += 1
        self._start(seat, lambda failure: None)

    def _start_all(self, report):
        for seat in self._seats:
            self._start(seat, report)

    def _start(self, seat, report):
        seat.state = "starting"
        self._begin(seat, lambda: seat.worker.start(self._examples), functools.partial(self._on_started, report=report))

    def _on_started(self, seat, call, future, report):
        if call != seat.call:
            return
        failure = future.exception()
        report(failure)
        if failure is None:
            self._take_up(seat)
            self._look_ahead()
        else:
            self._on_death(seat, None, f"it could not be started: {failure}")

    def _next(self, seat):
        if seat.failures >= _PATIENT_WITH:
            self._rest(seat, self._back_from_rest)
        else:
            self._take_up(seat)

    def _take_up(self, seat):
        """The oldest request that still wants this worker."""
        seat.state = "idle"
        for request in self._open:
            if request.wants(seat):
                self._send(seat, request)
                return

    def _look_ahead(self):
        """Tells requests that nobody is left to wait for."""
        for request in self._open:
            hope = any(
                seat.request is request or (seat.state in ("idle", "busy") and request.wants(seat))
                for seat in self._seats
            )
            if hope != request.hope:
                with request.changed:
                    request.hope = hope
                    request.changed.notify_all()
