"""Tests the bounded queue: order, limits, cancellation."""

import gc
import random
import threading
import weakref
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest

from jaxcode.serving._queue import BoundedQueue, QueueFull


@pytest.fixture
def gate():
    """An event for which tasks wait; set at the end, so that no thread waits for ever."""
    event = threading.Event()
    yield event
    event.set()


def test_tasks_run_in_the_order_of_their_submission(gate):
    queue, order = BoundedQueue(1, 10), []
    queue.submit(lambda: gate.wait(300))
    futures = [queue.submit(lambda i=i: order.append(i)) for i in range(10)]
    gate.set()
    for future in futures:
        future.result(30)
    assert order == list(range(10))


def test_a_task_leaves_the_queue_before_its_future_is_done():
    queue = BoundedQueue(1, 0)
    for i in range(2000):
        assert queue.submit(lambda i=i: i).result(30) == i


def test_an_exception_is_set_on_the_future_and_later_tasks_run():
    queue = BoundedQueue(1, 1)
    with pytest.raises(KeyError, match="lost"):
        queue.submit(lambda: {}["lost"]).result(30)
    assert queue.submit(lambda: 1).result(30) == 1


def test_what_a_cancelled_task_holds_is_freed_while_others_run(gate):
    class Payload:
        pass

    queue = BoundedQueue(1, 1)
    running = queue.submit(lambda: gate.wait(300))
    for _ in range(3):
        payload = Payload()
        reference = weakref.ref(payload)
        future = queue.submit(lambda payload=payload: payload)
        del payload
        with pytest.raises(QueueFull):
            queue.submit(lambda: None)
        assert future.cancel()
        gc.collect()
        assert reference() is None
    assert not running.done()


def test_what_a_finished_task_holds_is_freed():
    queue = BoundedQueue(1, 1)
    payload = Future()
    reference = weakref.ref(payload)
    queue.submit(lambda payload=payload: None).result(30)
    del payload
    # The thread frees the task just after its future is done, and before it runs the next one.
    queue.submit(lambda: None).result(30)
    gc.collect()
    assert reference() is None


def test_closing_waits_for_submitted_tasks_and_accepts_no_more(gate):
    queue = BoundedQueue(2, 10)
    futures = [queue.submit(lambda: gate.wait(300)) for _ in range(6)]
    threading.Timer(0.1, gate.set).start()
    queue.close()
    assert all(future.done() and future.result() for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit(lambda: None)


def test_the_limits_hold_while_many_threads_submit_and_cancel():
    queue = BoundedQueue(3, 4)
    lock = threading.Lock()
    running = peak = 0

    def task():
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        with lock:
            running -= 1

    def client(seed):
        rng, done = random.Random(seed), 0
        for _ in range(300):
            try:
                future = queue.submit(task)
            except QueueFull:
                continue
            if rng.random() < 0.5:
                future.cancel()
            try:
                future.result(30)
                done += 1
            except CancelledError:
                pass
        return done

    with ThreadPoolExecutor(12) as clients:
        assert sum(clients.map(client, range(12))) > 0
    assert peak <= 3
    gate = threading.Event()
    futures = [queue.submit(lambda: gate.wait(300)) for _ in range(7)]
    with pytest.raises(QueueFull):
        queue.submit(task)
    gate.set()
    assert all(future.result(30) for future in futures)
