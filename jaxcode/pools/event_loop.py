"""Handles events one after the other on one thread, so that the state they change needs no locks."""

import functools
import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar, final

from .responses import PoolClosed

log = logging.getLogger("jaxcode.pools")
log.addHandler(logging.NullHandler())

Event = Callable[[], object]
Result = TypeVar("Result")

# Seconds that closing waits for the thread.
_JOIN_LIMIT = 10.0


@final
class EventLoop:
    """Runs events on one thread in the order in which they are posted, and timers when they are due.

    Args:
        name: Name of the thread.
        on_close: Runs on the thread after the last event.
    """

    def __init__(self, name: str, on_close: Event = lambda: None):
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Event]] = []
        self._timer_numbers = itertools.count()
        self._lock = threading.Lock()
        self._closed = False
        self._on_close = on_close
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, event: Event) -> bool:
        """Queues an event; may be called from any thread.

        Returns:
            Whether the event will be handled: False once the loop is closed.
        """
        # The lock makes sure that no event is queued behind the one that ends the loop.
        with self._lock:
            if self._closed:
                return False
            self._events.put(event)
            return True

    def ask(self, event: Callable[[], Result]) -> Result:
        """Runs an event on the loop's thread and returns its result; to be called on other threads.

        Raises:
            PoolClosed: If the loop is closed.
            Exception: What the event raises.
        """
        outcome: Future[Any] = Future()

        def run():
            try:
                outcome.set_result(event())
            except Exception as failure:
                outcome.set_exception(failure)

        if not self.post(run):
            raise PoolClosed("the pool is closed")
        return outcome.result()

    def call_later(self, seconds: float, event: Event) -> None:
        """Runs an event after so many seconds; to be called on the loop's thread only."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._timer_numbers), event))

    def close(self) -> None:
        """Ends the loop after the events that are queued, and waits some seconds for it; closing twice does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._events.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_LIMIT)

    def _run(self):
        while self._handle_queued():
            while self._timers and self._timers[0][0] <= time.monotonic():
                _handle(heapq.heappop(self._timers)[2])
        _handle(self._on_close)

    def _handle_queued(self):
        """Waits for an event until the next timer is due, then handles all that are queued; False once it is closed.

        Events go before timers: under load answers are accepted although timers are late.
        """
        timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return True
        for _ in range(self._events.qsize()):
            if event is None:
                return False
            _handle(event)
            event = self._events.get()
        if event is not None:
            _handle(event)
        return event is not None


def _handle(event):
    try:
        event()
    except Exception:
        log.exception("an event could not be handled: %s", getattr(event, "func", event))


def failed_future(failure: Exception) -> Future:
    """Returns a future that has failed with this exception."""
    future: Future[Any] = Future()
    future.set_exception(failure)
    return future


def post_when_done(future: Future, loop: EventLoop, event: Callable[[Future], object]) -> None:
    """Posts an event, called with the future, when the future is done."""
    future.add_done_callback(lambda outcome: loop.post(functools.partial(event, outcome)))
