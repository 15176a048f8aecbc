"""Queues requests, up to a limit, for a few threads."""

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, final


class QueueFull(RuntimeError):
    """Raised when a request is rejected, as the server's queue is full; submit it again later, or elsewhere."""


@final
class BoundedQueue:
    """Runs tasks in the order of their submission, `num_threads` of them concurrently; up to `max_queued` more wait.

    A task whose future is cancelled while it waits leaves the queue and makes room for another. One that runs cannot
    be cancelled.

    Args:
        num_threads: How many tasks run concurrently.
        max_queued: How many more may wait.
    """

    def __init__(self, num_threads: int, max_queued: int):
        self._num_threads, self._max_queued = num_threads, max_queued
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="jaxcode request")
        self._lock = threading.Lock()
        # How many tasks are neither done nor cancelled, those of them that wait, and how many threads run tasks.
        self._num_admitted = 0
        self._queue: collections.deque[tuple[Future, Callable[[], Any]]] = collections.deque()
        self._num_running = 0
        self._closed = False

    def submit(self, task: Callable[[], Any]) -> Future:
        """Queues a task.

        Returns:
            A future of the task's result.

        Raises:
            QueueFull: If as many tasks run and wait as are allowed.
            RuntimeError: If the queue is closed.
        """
        future = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the server is closed; make another one to submit requests")
            if self._num_admitted >= self._num_threads + self._max_queued:
                raise QueueFull(
                    f"{self._num_threads} requests are in flight and {self._max_queued} wait (max_in_flight and "
                    "max_queued); submit this one again later, or allow more to wait"
                )
            if self._num_running < self._num_threads:
                # The thread waits for the lock, and then takes the task.
                self._executor.submit(self._run)
                self._num_running += 1
            self._num_admitted += 1
            self._queue.append((future, task))
        # Outside of the lock, as the callback takes it.
        future.add_done_callback(self._on_done)
        return future

    def close(self) -> None:
        """Waits for the tasks that were submitted, and accepts no more."""
        with self._lock:
            self._closed = True
        self._executor.shutdown()

    def _run(self):
        """Runs waiting tasks until there are none."""
        while True:
            with self._lock:
                if not self._queue:
                    self._num_running -= 1
                    return
                future, task = self._queue.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            result = failure = None
            try:
                result = task()
            except BaseException as problem:
                failure = problem
            # A thread that waits for the future may submit its next task immediately, and there must be room for it.
            with self._lock:
                self._num_admitted -= 1
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)
            # An idle thread must not keep the last request's arrays alive.
            del future, task, result, failure

    def _on_done(self, future):
        if future.cancelled():
            with self._lock:
                self._num_admitted -= 1
                self._queue = collections.deque(item for item in self._queue if item[0] is not future)
