"""Workers that are Ray actors: processes on this machine or on those of a cluster."""

import contextlib
import ipaddress
import logging
import os
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
from .compute import Around, Compute, packed
from .dispatch import AbstractWorker, WorkerDied
from .pool import AbstractPool

# Of a local cluster's object store, bytes: requests and answers pass through it.
_LOCAL_STORE = 2**29


class RayPool(AbstractPool):
    """Workers that are Ray actors, each a process of its own with its own device.

    The model and its parameters are sent to a worker when it is started; requests carry coded inputs only, and answers
    come back through shared memory. A worker that dies, or has not answered for long, is replaced in the background.

    Without an address, and unless Ray runs in this process already, a cluster of this machine alone is started, which
    listens on the loopback interface only and reports no usage statistics, and is ended with the pool.

    Args:
        f: The model, as `jaxcode.coded` takes it. It is sent to other processes: modules it is imported from must be
            there too.
        num_workers: N.
        address: Of a running cluster, as `ray.init` takes it: "auto", "host:6379" or "ray://host:10001".
        num_cpus: Processors that Ray reserves for a worker; none by default, so that workers may be more.
        num_gpus: GPUs that Ray reserves for a worker, parts of one too, and shows to it alone.
        resources: Other resources that Ray reserves for a worker, such as {"TPU": 4}.
        example: A batch for one worker that all compile for before they are ready, as for `warm_up`.
        around: As for `ThreadPool`; runs in the worker's process.
        stuck_after: Seconds after which a worker that has not answered is ended and replaced; None for never.
        start_limit: Seconds that workers may take to start. Those that take longer join later.
        progress: Whether to show how many have started, on standard error.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If f is no model or num_workers no whole number of at least 1.
        RuntimeError: If no worker could be started.
    """

    def __init__(
        self,
        f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]],
        num_workers: int,
        address: str | None = None,
        *,
        num_cpus: float = 0,
        num_gpus: float = 0,
        resources: Mapping[str, float] | None = None,
        example: PyTree[Any] | None = None,
        around: Around | None = None,
        stuck_after: float | None = 300.0,
        start_limit: float = 300.0,
        progress: bool = True,
    ):
        self.num_workers = check_count("num_workers", num_workers)
        fn, params = as_pure_function(f)
        ray, end = connect(address)
        self._end = contextlib.ExitStack()
        self._end.callback(end)
        try:
            model = ray.put((fn, packed(params), around, bool(jax.config.jax_enable_x64)))  # pyright: ignore[reportAttributeAccessIssue]
            actor = ray.remote(_Actor).options(
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                resources=dict(resources or {}),
                max_restarts=0,
                max_task_retries=0,
            )
            workers = [_RayWorker(ray, actor, number, model) for number in range(self.num_workers)]
            self._host = Host(
                fn, params, workers, example, stuck_after=stuck_after, start_limit=start_limit, progress=progress
            )
        except BaseException:
            self._end.close()
            raise

    def close(self) -> None:
        self._host.dispatcher.close()
        self._end.close()


def connect(address: str | None):
    """Ray, and what ends it if it was started for this pool."""
    with _environment():
        try:
            import ray
        except ImportError as problem:
            raise ImportError("RayPool needs Ray: pip install 'jaxcode[ray]'") from problem
        if ray.is_initialized():
            if address is not None and address != "auto":
                raise ValueError(f"address is {address!r}, but this process is connected to a Ray cluster already")
            return ray, lambda: None
        quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
        if address is not None:
            ray.init(address=address, **quiet)
            return ray, ray.shutdown
        with _on_loopback():
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=_LOCAL_STORE,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    listens = ray.nodes()[0]["NodeManagerAddress"]
    if not ipaddress.ip_address(listens).is_loopback:
        ray.shutdown()
        raise RuntimeError(
            f"Ray would listen on {listens}; set {_LOOPBACK[0]}={_LOOPBACK[1]} before Ray is imported, or start a "
            "cluster yourself and give its address"
        )
    return ray, ray.shutdown


# Ray replaces a loopback address of a node by one that other machines can reach, unless clusters are switched off.
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0"


@contextlib.contextmanager
def _environment():
    """What Ray reads when it is imported and when it starts its processes; of the user's own, nothing is replaced."""
    wanted = dict([_LOOPBACK, ("RAY_USAGE_STATS_ENABLED", "0")])
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _on_loopback():
    """The same for a Ray that was imported already, and read its environment then."""
    from ray._private import ray_constants

    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    ray_constants.ENABLE_RAY_CLUSTER = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before  # pyright: ignore[reportAttributeAccessIssue]


class _Actor:
    """The worker's process."""

    def __init__(self, number: int, model):
        fn, params, around, x64 = model
        jax.config.update("jax_enable_x64", x64)
        self._compute = Compute(fn, params, number, around)

    def warm_up(self, examples: Sequence[PyTree[jax.ShapeDtypeStruct]]) -> None:
        self._compute.warm_up(examples)

    def answer(self, batch: PyTree[np.ndarray]) -> PyTree[np.ndarray]:
        return self._compute(batch)


class _RayWorker(AbstractWorker):
    def __init__(self, ray, actor, number: int, model):
        self._ray, self._class, self._number, self._model = ray, actor, number, model
        self._actor = None

    def start(self) -> None:
        self.close()
        self._actor = self._class.remote(self._number, self._model)

    def warm_up(self, examples: Sequence[PyTree[jax.ShapeDtypeStruct]]) -> Future:
        return self._answer("warm_up", examples)

    def call(self, batch: PyTree[np.ndarray]) -> Future:
        return self._answer("answer", batch)

    def close(self) -> None:
        if self._actor is not None:
            self._ray.kill(self._actor)
            self._actor = None

    def join(self, seconds: float) -> None:
        pass  # it has been killed

    def _answer(self, method, argument):
        """What comes of a call, with what Ray raises told apart: the worker's end, or what the worker raised."""
        if self._actor is None:
            raise WorkerDied("it was not started")
        answer = Future()

        def tell(future):
            failure = future.exception()
            if failure is None:
                answer.set_result(future.result())
            elif isinstance(failure, self._ray.exceptions.RayTaskError):
                answer.set_exception(failure.cause or failure)
            else:
                answer.set_exception(WorkerDied(_why(failure)))

        getattr(self._actor, method).remote(argument).future().add_done_callback(tell)
        return answer


def _why(failure):
    """The line of Ray's message that tells most: what a constructor raised comes last."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or [""]
    return f"{type(failure).__name__}: {lines[-1] if 'creation task' in lines[0] else lines[0]}"
