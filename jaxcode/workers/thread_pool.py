"""Workers on the devices of this process, a thread each."""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from flax import linen, nnx
from jaxtyping import PyTree

from ..checks import check_count
from ..functions import as_pure_function
from ._host import Host
from .compute import Around, Compute
from .dispatch import AbstractWorker
from .pool import AbstractPool


class ThreadPool(AbstractPool):
    """Workers that are threads of this process, one for each device or several.

    Answers are had one by one, as devices finish, where one program over all of them returns with the slowest. A thread
    cannot be ended from outside: one that never comes back keeps its device, and is given up when the process ends.

    Args:
        f: The model, as `jaxcode.coded` takes it.
        num_workers: N; as many as devices if not given.
        devices: Worker n computes on the n-th, and around again; `jax.local_devices()` if not given.
        example: A batch for one worker that all compile for at once, as for `warm_up`.
        around: What a worker does in place of computing: called with its number, the compiled model and a batch, it
            returns what the worker answers. To measure, to trace, or to rehearse delays and faults.

    Raises:
        ValueError: If f is no model, or there are no devices or workers.

    >>> import jax.numpy as jnp
    >>> from jaxcode import stop
    >>> with ThreadPool(jnp.sin, num_workers=3) as pool:
    ...     responses = pool.run(np.ones((3, 2, 4), np.float32), stop.answers(3))
    >>> responses.values.shape, responses.returned.all()
    ((3, 2, 4), np.True_)
    """

    def __init__(
        self,
        f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]],
        num_workers: int | None = None,
        *,
        devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
        example: PyTree[Any] | None = None,
        around: Around | None = None,
    ):
        devices = jax.local_devices() if devices is None else list(devices)
        if not devices:
            raise ValueError("devices is empty; expected at least one, such as jax.devices()")
        self.num_workers = check_count("num_workers", len(devices) if num_workers is None else num_workers)
        fn, params = as_pure_function(f)
        workers = []
        for number in range(self.num_workers):
            device = devices[number % len(devices)]
            workers.append(_Thread(number, lambda n=number, d=device: Compute(fn, params, n, around, d)))
        self._host = Host(fn, params, workers, example)


class _Thread(AbstractWorker):
    def __init__(self, number: int, make: Callable[[], Compute]):
        self._number, self._make = number, make
        self._tasks: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._compute: Compute | None = None
        self._thread = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=f"jaxcode worker {self._number}", daemon=True)
            self._thread.start()

    def warm_up(self, examples: Sequence[PyTree[jax.ShapeDtypeStruct]]) -> Future:
        return self._submit(lambda: self._running().warm_up(examples))

    def call(self, batch: PyTree[np.ndarray]) -> Future:
        return self._submit(lambda: self._running()(batch))

    def close(self) -> None:
        self._tasks.put(None)

    def join(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def _running(self):
        if self._compute is None:
            self._compute = self._make()
        return self._compute

    def _submit(self, task):
        future = Future()
        self._tasks.put((future, task))
        return future

    def _loop(self):
        while (item := self._tasks.get()) is not None:
            future, task = item
            try:
                future.set_result(task())
            except BaseException as failure:  # whatever a model raises is its answer
                future.set_exception(failure)
