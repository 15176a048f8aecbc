"""Runs workers as threads of this process, on its devices."""

import functools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, final

import jax
import numpy as np
from jaxtyping import PyTree

from .._float64 import x64_is_on
from ..checks import check_count
from ..functions import Model, as_pure_function
from .compute import CompiledModel, Interceptor
from .pool import WorkerPool
from .supervisor import WorkerDied
from .worker import AbstractWorker


def ThreadPool(
    f: Model,
    num_workers: int | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    example: PyTree[Any] | None = None,
    interceptor: Interceptor | None = None,
) -> WorkerPool:
    """Makes a pool of workers that are threads of this process, one for each device or several.

    Each answer comes as soon as its device finishes, whereas one program over all devices returns with the slowest. A
    thread cannot be ended from outside: one that never returns keeps its device until the process ends.

    Args:
        f: The model, as `jaxcode.coded` takes it.
        num_workers: N; the number of devices if not given.
        devices: Worker n computes on device n modulo their number; `jax.local_devices()` if not given.
        example: A batch for one worker that all compile for before they are ready, as for `AbstractPool.warm_up`.
        interceptor: Called in place of the compiled model with the worker's number, the compiled model and a batch;
            returns the worker's answer. For measuring, tracing and injecting delays and faults.

    Returns:
        The pool, started.

    Raises:
        ValueError: If f is no model, or there are no devices or workers; and as for `WorkerPool`.
        RuntimeError: If no worker could be started.

    >>> import jax.numpy as jnp
    >>> from jaxcode import stop
    >>> with ThreadPool(jnp.sin, num_workers=3) as pool:
    ...     responses = pool.run(np.ones((3, 2, 4), np.float32), stop.answers(3))
    >>> responses.values.shape, responses.returned.all()
    ((3, 2, 4), np.True_)
    """
    devices = jax.local_devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("devices is empty; expected at least one, such as jax.devices()")
    num_workers = check_count("num_workers", len(devices) if num_workers is None else num_workers)
    fn, params = as_pure_function(f)
    makers = [
        functools.partial(CompiledModel, fn, params, number, interceptor, devices[number % len(devices)])
        for number in range(num_workers)
    ]
    workers = [_ThreadWorker(number, make, x64_is_on()) for number, make in enumerate(makers)]
    return WorkerPool(fn, params, workers, example)


@final
class _ThreadWorker(AbstractWorker):
    """Computes on one thread. A restart makes another thread with another copy of the parameters."""

    def __init__(self, number: int, make: Callable[[], CompiledModel], x64: bool):
        self._number, self._make, self._x64 = number, make, x64
        self._tasks: queue.SimpleQueue[tuple[Future, Callable[[CompiledModel], Any]] | None] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self.close()
        self._tasks = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_work, args=(self._tasks, self._make, self._x64), name=f"jaxcode worker {self._number}", daemon=True
        )
        self._thread.start()

    def warm_up(self, examples: Sequence[PyTree[jax.ShapeDtypeStruct]]) -> Future:
        return self._submit(lambda model: model.warm_up(examples))

    def call(self, batch: PyTree[np.ndarray]) -> Future:
        return self._submit(lambda model: model(batch))

    def close(self) -> None:
        if self._tasks is not None:
            self._tasks.put(None)
            self._tasks = None

    def join(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def _submit(self, task):
        if self._tasks is None:
            raise WorkerDied("its thread was ended")
        future = Future()
        self._tasks.put((future, task))
        return future


def _work(tasks, make, x64):
    """Runs tasks until None is queued, with the setting of jax_enable_x64 of the thread that made the pool."""
    model = None
    with jax.enable_x64(x64):
        while (item := tasks.get()) is not None:
            future, task = item
            try:
                model = make() if model is None else model
                future.set_result(task(model))
            except BaseException as failure:  # whatever a model raises is the outcome of its call
                future.set_exception(failure)
            # While the thread waits for its next task, it must not keep the last answer alive.
            del item, future, task
