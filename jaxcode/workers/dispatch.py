"""The host's side of a pool: who gets what to do, what became of it, and who rests.

All decisions are made by one thread, which takes up events one after the other: a request, an answer, a death, an
alarm. What takes long happens elsewhere: in workers, and in the threads that wait for their requests.
"""

import abc
import contextlib
import functools
import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import jax
import numpy as np
from jaxtyping import PyTree

from .compute import refusal
from .request import Request
from .responses import Fault, PoolClosed

log = logging.getLogger("jaxcode.workers")
log.addHandler(logging.NullHandler())

# Failures in a row after which a worker rests, and for how many seconds, doubled from one rest to the next.
_PATIENT_WITH = 3
_SHORTEST_REST, _LONGEST_REST = 0.5, 60.0
# Seconds from one look for workers that do not answer to the next.
_LOOK_EVERY = 0.5
# Seconds that workers have to end of themselves.
_CLOSING = 2.0
_COUNTED = ("answers", "late", "raised", "refused", "deaths", "restarts", "rests")


class WorkerDied(Exception):
    """The worker cannot answer any more."""


class AbstractWorker(abc.ABC):
    """One worker, seen from the host. No method blocks; what they return is done when the worker is."""

    @abc.abstractmethod
    def start(self) -> None:
        """Starts it, again if it ran before."""

    @abc.abstractmethod
    def warm_up(self, examples: Sequence[PyTree[jax.ShapeDtypeStruct]]) -> Future:
        """Has it compile for such batches. Done at once if there are none and it runs."""

    @abc.abstractmethod
    def call(self, batch: PyTree[np.ndarray]) -> Future:
        """Its answer to a batch. The future raises `WorkerDied` where it is dead, else what it raised."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends it."""

    @abc.abstractmethod
    def join(self, seconds: float) -> None:
        """Waits for its end, so long at most."""


class _Seat:
    """A worker's place in the pool."""

    def __init__(self, number: int, worker: AbstractWorker):
        self.number, self.worker = number, worker
        self.state = "starting"
        self.failures = 0
        # How many of the pool's examples it has compiled for.
        self.warm = 0
        self.request: Request | None = None
        self.share = -1
        self.since = time.monotonic()
        # Outcomes of calls that were given up have another number.
        self.call = 0


class Dispatcher:
    """Keeps workers going and gathers their answers.

    Args:
        workers: Not started yet.
        examples: Batches that all compile for when they are started.
        stuck_after: Seconds after which a worker that has not answered a call is taken for dead; None for never.
        start_limit: Seconds that a worker may take to start.
    """

    def __init__(
        self,
        workers: Sequence[AbstractWorker],
        examples: Sequence[PyTree[jax.ShapeDtypeStruct]],
        *,
        stuck_after: float | None,
        start_limit: float,
    ):
        self._seats = [_Seat(number, worker) for number, worker in enumerate(workers)]
        self._stuck_after, self._start_limit = stuck_after, start_limit
        self._examples = list(examples)
        self._open: list[Request] = []
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._alarms: list[tuple[float, int, Callable[[], None]]] = []
        self._tie = itertools.count()
        self._closed = False
        self._counters: dict[str, int] = dict.fromkeys(_COUNTED, 0)
        # Told of every worker that has become warm, or could not.
        self._watchers: list[queue.SimpleQueue[tuple[int, int, Exception | None]]] = []
        self._thread = threading.Thread(target=self._loop, name="jaxcode dispatcher", daemon=True)
        self._thread.start()

    # ---- called from any thread ----------------------------------------------------------------------------

    def start(self, on_ready: Callable[[], object]) -> None:
        """Starts all workers and waits for them; those that take too long go on starting in the background.

        Raises:
            RuntimeError: If none can be started.
        """
        ready, problem = self._watch(self._start_all, 0, on_ready)
        if not ready:
            self.close()
            raise RuntimeError(f"no worker could be started within {self._start_limit} s") from problem

    def warm_up(self, shapes: PyTree[jax.ShapeDtypeStruct]) -> None:
        """Has all workers compile for such batches and waits for those that can; others do when they come back."""
        if shapes not in self._examples:
            number = len(self._examples) + 1
            self._watch(functools.partial(self._on_example, shapes), number, lambda: None)

    @contextlib.contextmanager
    def working_on(self, request: Request) -> Iterator[None]:
        """Has workers work on a request meanwhile.

        Raises:
            PoolClosed: If the pool is closed.
        """
        self._events.put(functools.partial(self._on_request, request))
        if self._closed:
            raise PoolClosed("the pool is closed")
        try:
            yield
        finally:
            request.finished = True
            self._events.put(functools.partial(self._on_finished, request))

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

    def _watch(self, event, number, on_ready):
        """Waits until every worker has compiled for so many examples, or has failed, or takes too long."""
        told = queue.SimpleQueue()
        self._watchers.append(told)
        self._events.put(event)
        end, ready, failed, problem = time.monotonic() + self._start_limit, set(), set(), None
        try:
            while len(ready | failed) < len(self._seats) and not self._closed:
                seat, warm, failure = told.get(timeout=max(0.0, end - time.monotonic()))
                if failure is not None:
                    failed.add(seat)
                    problem = failure
                elif warm >= number and seat not in ready:
                    ready.add(seat)
                    on_ready()
        except queue.Empty:
            pass
        finally:
            self._watchers.remove(told)
        return ready, problem

    # ---- the dispatcher's own thread -----------------------------------------------------------------------

    def _loop(self):
        while not self._closed:
            try:
                self._next_event()()
            except Exception:
                log.exception("an event could not be handled")
        closed = PoolClosed("the pool was closed during the request")
        for request in self._open:
            request.fail(closed)
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, functools.partial) and event.func == self._on_request:
                event.args[0].fail(closed)
        for seat in self._seats:
            try:
                seat.worker.close()
            except Exception:
                log.exception("worker %d could not be closed", seat.number)
        end = time.monotonic() + _CLOSING
        for seat in self._seats:
            seat.worker.join(max(0.0, end - time.monotonic()))

    def _next_event(self):
        """What is due, else what comes first."""
        wait = self._alarms[0][0] - time.monotonic() if self._alarms else None
        if wait is None or wait > 0:
            try:
                return self._events.get(timeout=wait)
            except queue.Empty:
                pass
        return heapq.heappop(self._alarms)[2]

    def _after(self, seconds, event):
        heapq.heappush(self._alarms, (time.monotonic() + seconds, next(self._tie), event))

    def _begin(self, seat, state, begin, then):
        seat.call += 1
        seat.state, seat.since = state, time.monotonic()
        call = seat.call
        try:
            future = begin()
        except Exception as failure:
            future = Future()
            future.set_exception(WorkerDied(str(failure)))
        future.add_done_callback(lambda future: self._events.put(functools.partial(then, seat, call, future)))

    # ---- requests ------------------------------------------------------------------------------------------

    def _on_request(self, request):
        self._open.append(request)
        self._give_out()
        if request.again_after is not None:
            self._after(request.again_after, functools.partial(self._on_overdue, request))

    def _on_overdue(self, request):
        if not request.finished:
            self._give_out()
            self._after(request.again_after / 4, functools.partial(self._on_overdue, request))

    def _on_finished(self, request):
        if request in self._open:
            self._open.remove(request)
        for number in {fault.worker for fault in request.faults if fault.kind != "died"}:
            seat = self._seats[number]
            self._blame(seat, request)
            if seat.state == "idle":
                self._release(seat)

    def _give_out(self):
        """Something to do for all who are idle, and a word to those who wait in vain."""
        for seat in self._seats:
            if seat.state == "idle":
                self._take_up(seat)
        for request in self._open:
            request.has_hope(
                any(seat.request is request for seat in self._seats)
                or (request.open_shares and any(self._may_help(seat, request) for seat in self._seats))
            )

    def _may_help(self, seat, request):
        return seat.state in ("idle", "busy") and seat.number not in request.failed

    def _take_up(self, seat):
        """Compiles for what is new, else computes for the oldest request that has something to do for this worker."""
        if seat.warm < len(self._examples):
            warm_up = functools.partial(seat.worker.warm_up, self._examples[seat.warm :])
            self._begin(seat, "busy", warm_up, functools.partial(self._on_warm, number=len(self._examples)))
            return
        for request in self._open:
            share = request.take(seat.number)
            if share is not None:
                seat.request, seat.share = request, share
                batch = request.batch(share)
                self._begin(seat, "busy", functools.partial(seat.worker.call, batch), self._on_answer)
                return

    def _release(self, seat):
        """It is idle, or must rest."""
        if seat.failures >= _PATIENT_WITH:
            self._rest(seat, self._return)
        else:
            seat.state = "idle"

    def _return(self, seat):
        seat.state = "idle"
        self._give_out()

    def _on_answer(self, seat, call, future):
        if call != seat.call:
            return
        request, failure = seat.request, future.exception()
        seat.request = None
        if isinstance(failure, WorkerDied):
            self._on_death(seat, request, str(failure))
            return
        late, problem = request.finished or bool(request.returned[seat.share]), None
        if failure is not None:
            self._fault(seat, request, "raised", f"{type(failure).__name__}: {failure}")
        else:
            answer = future.result()
            problem = refusal(answer, request.expected) if late else request.accept(seat.share, answer)
            if problem is not None:
                self._fault(seat, request, "refused", problem)
        if failure is None and problem is None:
            self._counters["late" if late else "answers"] += 1
            seat.failures = 0
        elif request.finished:
            self._blame(seat, request)
        self._release(seat)
        self._give_out()

    def _blame(self, seat, request):
        """A worker that failed where others did not; where all did, the request is to blame."""
        seat.failures += bool(request.returned.any())

    def _fault(self, seat, request, kind, message):
        self._counters["deaths" if kind == "died" else kind] += 1
        log.warning("worker %d %s: %s", seat.number, kind, message, extra={"worker": seat.number, "kind": kind})
        if request is not None:
            request.give_back(seat.share, seat.number, Fault(seat.number, kind, message))

    # ---- workers -------------------------------------------------------------------------------------------

    def _on_example(self, shapes):
        self._examples = [*self._examples, shapes]
        self._give_out()

    def _start_all(self):
        for seat in self._seats:
            self._start(seat)
        self._look_for_stuck()

    def _start(self, seat):
        seat.warm = 0
        examples = self._examples

        def begin():
            seat.worker.start()
            return seat.worker.warm_up(examples)

        self._begin(seat, "starting", begin, functools.partial(self._on_warm, number=len(examples)))

    def _on_warm(self, seat, call, future, number):
        if call != seat.call:
            return
        failure = future.exception()
        for told in self._watchers:
            told.put((seat.number, number, failure))
        if failure is None:
            seat.warm = number
            self._return(seat)
        else:
            self._on_death(seat, None, f"it could not be started: {failure}")

    def _on_death(self, seat, request, message):
        self._fault(seat, request, "died", message)
        seat.failures += 1
        if request is not None:
            # What runs there next is another process, which may have what is left.
            request.failed.discard(seat.number)
        if seat.failures >= _PATIENT_WITH:
            self._rest(seat, self._restart)
        else:
            self._restart(seat)
        self._give_out()

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

    def _restart(self, seat):
        self._counters["restarts"] += 1
        self._start(seat)
