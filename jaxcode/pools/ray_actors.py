"""Connects this process to Ray, once for all users of it, and runs actors that a `Supervisor` restarts.

A cluster that this module starts is ended when its last user closes the reference. If other code has shut Ray down or
initialised it again, no function of Ray is called, because Ray would start a cluster by itself that listens on all
interfaces.
"""

import contextlib
import dataclasses
import ipaddress
import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, final

from .supervisor import AbstractProcess, WorkerDied

# Bytes of a local cluster's object store, which holds requests and answers.
_LOCAL_STORE = 2**29
# Ray replaces a loopback address of a node by one that other machines can reach, unless clusters are switched off. It
# reads this when it is imported.
_LOOPBACK = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
_NO_STATISTICS = ("RAY_USAGE_STATS_ENABLED", "0")
_LOGGING = {"log_to_driver": False, "logging_level": logging.WARNING}


@dataclasses.dataclass
class _Session:
    """Describes the connection of this process to a cluster.

    Attributes:
        identity: The job and the node, by which it differs from later connections.
        is_owner: Whether this module made it, and ends it with its last user.
        address: As `connect` took it.
        users: The number of open references.
    """

    identity: tuple[str, str]
    is_owner: bool
    address: str | None
    users: int = 0


_lock = threading.RLock()
_session: _Session | None = None


def connect(address: str | None = None) -> "RayCluster":
    """Connects this process to a cluster, or starts a cluster of this machine alone.

    Args:
        address: Of a running cluster, as `ray.init` takes it. If None, Ray is used as this process has initialised it,
            else a cluster is started that listens on the loopback interface only and reports no usage statistics.

    Returns:
        A reference, to be closed. A connection or cluster that this module made is ended with the last reference.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If the process is connected to another cluster already.
        RuntimeError: If a cluster that is started would listen on more than the loopback interface.
    """
    global _session
    with _lock:
        ray = _import_ray(loopback=address is None)
        if _session is None or not _is_current(ray, _session):
            is_owner = not ray.is_initialized()
            if is_owner:
                _initialise(ray, address)
            elif address not in (None, "auto"):
                raise ValueError(f"address is {address!r}, but this process is connected to a Ray cluster already")
            _session = _Session(_identity(ray), is_owner, address)
        elif address not in (None, "auto", _session.address):
            raise ValueError(f"address is {address!r}, but this process is connected to a Ray cluster already")
        _session.users += 1
        return RayCluster(ray, _session)


@final
class RayCluster:
    """Holds a reference to Ray in this process, made by `connect`.

    Attributes:
        ray: The module `ray`.
    """

    def __init__(self, ray: Any, session: _Session):
        self.ray, self._session = ray, session
        self._closed = False

    def check(self) -> None:
        """Checks that Ray is initialised as it was when the reference was made.

        Raises:
            WorkerDied: If it is not, or the reference is closed.
        """
        if self._closed or not _is_current(self.ray, self._session):
            raise WorkerDied("Ray has been shut down in this process")

    def put(self, value: Any) -> Any:
        """Puts a value in the object store and returns its reference, which can be an argument of actors.

        Raises:
            WorkerDied: As `check`.
        """
        self.check()
        return self.ray.put(value)

    def actor_class(
        self, cls: type, *, num_cpus: float = 0.0, num_gpus: float = 0.0, resources: Mapping[str, float] | None = None
    ) -> Any:
        """Makes a class of actors, which Ray does not restart by itself.

        Args:
            cls: The class that actors are instances of.
            num_cpus: Processors that Ray reserves for each actor.
            num_gpus: GPUs that Ray reserves for each actor.
            resources: Other resources that Ray reserves for each actor.
        """
        return self.ray.remote(cls).options(
            num_cpus=num_cpus, num_gpus=num_gpus, resources=dict(resources or {}), max_restarts=0, max_task_retries=0
        )

    def close(self) -> None:
        """Releases the reference; the last one ends what `connect` has made. Closing twice does no harm."""
        global _session
        with _lock:
            if self._closed:
                return
            self._closed = True
            self._session.users -= 1
            if self._session.users == 0:
                if self._session.is_owner and _is_current(self.ray, self._session):
                    self.ray.shutdown()
                if _session is self._session:
                    _session = None


@final
class RayActor(AbstractProcess):
    """Starts, calls and ends a Ray actor from the host.

    Args:
        cluster: The cluster that it runs on.
        actor_class: As `RayCluster.actor_class` returns it.
        arguments: Called at every start, on the supervisor's thread; returns the arguments of the constructor.
    """

    def __init__(self, cluster: RayCluster, actor_class: Any, arguments: Callable[[], tuple[Any, ...]]):
        self._cluster, self._class, self._arguments = cluster, actor_class, arguments
        self._actor: Any = None

    def start(self) -> None:
        self.close()
        self._cluster.check()
        self._actor = self._class.remote(*self._arguments())

    def call(self, method: str, *args: Any) -> Future:
        """Calls a method of the actor.

        Returns:
            A future of the method's result. It raises what the method raised, or `WorkerDied` where the process is dead
            or could not be started.

        Raises:
            WorkerDied: If the actor has not been started, or Ray has been shut down.
        """
        if self._actor is None:
            raise WorkerDied("its process was ended")
        self._cluster.check()
        outcome: Future[Any] = Future()

        def transfer(future):
            failure = future.exception()
            if failure is None:
                outcome.set_result(future.result())
            elif isinstance(failure, self._cluster.ray.exceptions.RayTaskError):
                outcome.set_exception(failure.cause or failure)
            else:
                outcome.set_exception(WorkerDied(_reason(failure)))

        getattr(self._actor, method).remote(*args).future().add_done_callback(transfer)
        return outcome

    def close(self) -> None:
        actor, self._actor = self._actor, None
        if actor is not None:
            with contextlib.suppress(WorkerDied):  # where Ray has been shut down, its actors have ended
                self._cluster.check()
                self._cluster.ray.kill(actor)

    def join(self, seconds: float) -> None:
        pass  # `close` has killed it


def _import_ray(loopback):
    with _environment(*[_LOOPBACK] * loopback, _NO_STATISTICS):
        try:
            import ray
        except ImportError as problem:
            raise ImportError("Ray is not installed: pip install 'jaxcode[ray]'") from problem
    return ray


def _initialise(ray, address):
    with _environment(_NO_STATISTICS), warnings.catch_warnings():
        # The warning does not apply: Ray calls exec right after the fork and needs no thread of this process.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        if address is not None:
            ray.init(address=address, **_LOGGING)
            return
        # The address that Ray uses in place of a loopback address.
        host = ray.util.get_node_ip_address()
        if not ipaddress.ip_address(host).is_loopback:
            name, value = _LOOPBACK
            raise RuntimeError(
                f"Ray, which was imported before, would start a cluster that listens on {host}, which other "
                f"machines can reach; set {name}={value} in the environment before Ray is imported, or import it after "
                "the pool is made, or start a cluster yourself: by ray.init(), or by ray start, whose address is given"
            )
        with _environment(_LOOPBACK):
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=_LOCAL_STORE,
                _node_ip_address=host,
                **_LOGGING,
            )


def _identity(ray):
    context = ray.get_runtime_context()
    return context.get_job_id(), context.get_node_id()


def _is_current(ray, session):
    """Returns whether Ray is initialised as it was when the session began; if not, Ray must not be used."""
    return ray.is_initialized() and _identity(ray) == session.identity


@contextlib.contextmanager
def _environment(*settings):
    """Sets environment variables that Ray reads, while the context is open, except those that the user has set."""
    variables = {name: value for name, value in settings if name not in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)


def _reason(failure):
    """Returns the most informative line of Ray's message: the last one where a constructor raised, else the first."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or [""]
    return f"{type(failure).__name__}: {lines[-1] if 'creation task' in lines[0] else lines[0]}"
