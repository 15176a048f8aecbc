"""Runs workers as Ray actors: processes on this machine or on those of a cluster."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, final

import jax
import numpy as np
from jaxtyping import PyTree

from .._float64 import x64_is_on
from ..checks import check_count
from ..functions import Model, as_pure_function
from .compute import CompiledModel, Interceptor, pack
from .pool import WorkerPool
from .ray_actors import RayActor, connect
from .worker import AbstractWorker


def RayPool(
    f: Model,
    num_workers: int,
    address: str | None = None,
    *,
    num_cpus: float = 0.0,
    num_gpus: float = 0.0,
    resources: Mapping[str, float] | None = None,
    example: PyTree[Any] | None = None,
    interceptor: Interceptor | None = None,
    stuck_after: float | None = 300.0,
    start_limit: float = 300.0,
    progress: bool = True,
) -> WorkerPool:
    """Makes a pool of workers that are Ray actors, each a process of its own with its own device.

    The model and its parameters are sent to a worker when it is started; requests carry shares only, and answers come
    back through shared memory. A worker that dies, or is stuck, is replaced in the background.

    Without an address, and unless Ray runs in this process already, a cluster of this machine alone is started, which
    listens on the loopback interface only and reports no usage statistics. It is ended with the last pool that uses it.

    Args:
        f: The model, as `jaxcode.coded` takes it. It is sent to other processes: modules it is imported from must be
            there too.
        num_workers: N.
        address: That of a running cluster, as `ray.init` takes it: "auto", "host:6379" or "ray://host:10001".
        num_cpus: Processors that Ray reserves for a worker; none by default, so that there may be more workers than
            processors.
        num_gpus: GPUs, or a fraction of one, that Ray reserves for a worker, which sees no others.
        resources: Other resources that Ray reserves for a worker, such as {"TPU": 4}.
        example: A batch for one worker that all compile for before they are ready, as for `AbstractPool.warm_up`.
        interceptor: As for `ThreadPool`; runs in the worker's process.
        stuck_after: Seconds after which a worker that has not answered is ended and replaced; None for never.
        start_limit: Seconds that workers may take to start and to compile. Those that take longer join later.
        progress: Whether to show how many have started, on standard error.

    Returns:
        The pool, started.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If f is no model, num_workers is not a whole number of at least 1, or this process is connected to
            another cluster already; and as for `WorkerPool`.
        RuntimeError: If no worker could be started, or Ray would listen on more than the loopback interface.
    """
    num_workers = check_count("num_workers", num_workers)
    fn, params = as_pure_function(f)
    cluster = connect(address)
    try:
        model = cluster.put((fn, pack(params), interceptor, x64_is_on()))
        actor_class = cluster.actor_class(_Actor, num_cpus=num_cpus, num_gpus=num_gpus, resources=resources)
        workers = [
            _RayWorker(RayActor(cluster, actor_class, lambda number=number: (number, model)))
            for number in range(num_workers)
        ]
        return WorkerPool(
            fn,
            params,
            workers,
            example,
            stuck_after=stuck_after,
            start_limit=start_limit,
            progress=progress,
            on_close=cluster.close,
        )
    except BaseException:
        cluster.close()
        raise


@final
class _Actor:
    """Computes the model in the worker's process."""

    def __init__(self, number: int, model):
        fn, params, interceptor, x64 = model
        jax.config.update("jax_enable_x64", x64)
        self._model = CompiledModel(fn, params, number, interceptor)

    def warm_up(self, examples: Sequence[PyTree[jax.ShapeDtypeStruct]]) -> None:
        self._model.warm_up(examples)

    def answer(self, batch: PyTree[np.ndarray]) -> PyTree[np.ndarray]:
        return self._model(batch)


@final
class _RayWorker(AbstractWorker):
    """Calls the worker's actor from the host."""

    def __init__(self, actor: RayActor):
        self._actor = actor

    def start(self) -> None:
        self._actor.start()

    def warm_up(self, examples: Sequence[PyTree[jax.ShapeDtypeStruct]]) -> Future:
        return self._actor.call("warm_up", examples)

    def call(self, batch: PyTree[np.ndarray]) -> Future:
        return self._actor.call("answer", batch)

    def close(self) -> None:
        self._actor.close()

    def join(self, seconds: float) -> None:
        self._actor.join(seconds)
