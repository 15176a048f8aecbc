"""Tests how Ray is started, used and ended, with a fake Ray that records the calls."""

import itertools
import os
import sys
import types
from concurrent.futures import Future

import pytest

from jaxcode.pools import WorkerDied
from jaxcode.pools.ray_actors import RayActor, connect


class FakeRay(types.ModuleType):
    """Fakes what is used of Ray. Like Ray, it starts a cluster by itself when it is called while there is none.

    Args:
        host: The address at which a cluster of this machine listens.
    """

    class exceptions:
        class RayTaskError(Exception):
            cause: Exception | None = None

        class RayActorError(Exception):
            pass

    def __init__(self, host="127.0.0.1"):
        super().__init__("ray")
        self.cluster, self.started_by_itself, self.inits, self.killed = None, 0, [], []
        self._numbers = itertools.count()
        self.util = types.SimpleNamespace(get_node_ip_address=lambda: host)

    def is_initialized(self):
        return self.cluster is not None

    def init(self, **arguments):
        assert self.cluster is None
        self.cluster = next(self._numbers)
        self.inits.append(arguments)

    def shutdown(self):
        self.cluster = None

    def _start_if_needed(self):
        if self.cluster is None:
            self.started_by_itself += 1
            self.init()

    def get_runtime_context(self):
        self._start_if_needed()
        return types.SimpleNamespace(get_job_id=lambda: "1", get_node_id=lambda: str(self.cluster))

    def put(self, value):
        self._start_if_needed()
        return value

    def kill(self, actor):
        self._start_if_needed()
        self.killed.append(actor)

    def remote(self, cls):
        return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=self._create))

    def _create(self, *arguments):
        self._start_if_needed()
        return FakeActor(self, arguments)


class FakeActor:
    def __init__(self, ray, arguments):
        self.ray, self.arguments, self.outcome = ray, arguments, None

    @property
    def work(self):
        def remote(*arguments):
            self.ray._start_if_needed()
            future = Future()
            if isinstance(self.outcome, Exception):
                future.set_exception(self.outcome)
            else:
                future.set_result((self.arguments, arguments))
            return types.SimpleNamespace(future=lambda: future)

        return types.SimpleNamespace(remote=remote)


@pytest.fixture
def ray(monkeypatch):
    # As if this process were not connected, whatever other tests have done.
    monkeypatch.setattr("jaxcode.pools.ray_actors._session", None)
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    yield ray
    assert ray.started_by_itself == 0


def make_actor(cluster, arguments=lambda: (1,)):
    return RayActor(cluster, cluster.actor_class(object), arguments)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_cluster_is_ended_with_its_last_reference_whichever_that_is(ray, order):
    clusters = [connect() for _ in range(3)]
    assert len(ray.inits) == 1
    for number in order[:2]:
        clusters[number].close()
        clusters[number].close()
        assert ray.is_initialized()
    actor = make_actor(clusters[order[2]])
    actor.start()
    clusters[order[2]].close()
    assert not ray.is_initialized()
    connect().close()
    assert len(ray.inits) == 2


def test_a_cluster_of_this_machine_listens_on_the_loopback_interface(ray):
    environment = dict(os.environ)
    connect().close()
    assert dict(os.environ) == environment
    (arguments,) = ray.inits
    assert arguments["address"] == "local"
    assert arguments["_node_ip_address"] == "127.0.0.1"


def test_a_cluster_that_other_machines_could_reach_is_not_started(ray, monkeypatch):
    other = FakeRay(host="10.0.0.7")
    monkeypatch.setitem(sys.modules, "ray", other)
    with pytest.raises(RuntimeError, match=r"listens on 10\.0\.0\.7.*RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0"):
        connect()
    assert other.inits == []
    connect("10.0.0.7:6379").close()
    assert other.inits[0]["address"] == "10.0.0.7:6379"


def test_a_ray_that_other_code_initialised_is_used_and_not_ended(ray):
    ray.init()
    cluster = connect()
    with pytest.raises(ValueError, match="connected to a Ray cluster already"):
        connect("10.0.0.7:6379")
    cluster.close()
    assert ray.is_initialized()


@pytest.mark.parametrize("is_restarted", [False, True], ids=["shut down", "another"])
def test_no_function_of_ray_is_called_once_it_was_shut_down_or_is_another(ray, is_restarted):
    cluster = connect()
    actor = make_actor(cluster)
    actor.start()
    ray.shutdown()
    if is_restarted:
        ray.init()
    for call in (lambda: actor.call("work"), actor.start, lambda: cluster.put(1)):
        with pytest.raises(WorkerDied):
            call()
    actor.close()
    cluster.close()
    assert ray.killed == []
    # The other cluster is not ended.
    assert ray.is_initialized() == is_restarted


def test_every_start_calls_for_arguments_and_ends_the_previous_actor(ray):
    numbers = itertools.count()
    cluster = connect()
    actor = make_actor(cluster, lambda: (next(numbers),))
    with pytest.raises(WorkerDied):
        actor.call("work")
    for number in range(3):
        actor.start()
        assert actor.call("work", "a", 2).result() == ((number,), ("a", 2))
        assert len(ray.killed) == number
    actor.close()
    actor.close()
    assert len(ray.killed) == 3
    cluster.close()


def test_an_exception_of_the_actor_differs_from_its_death(ray):
    cluster = connect()
    actor = make_actor(cluster)
    actor.start()
    raised = ray.exceptions.RayTaskError()
    raised.cause = OSError("no disk")
    for outcome, expected in ((raised, OSError), (ray.exceptions.RayActorError("it is gone"), WorkerDied)):
        actor._actor.outcome = outcome
        with pytest.raises(expected, match=r"no disk|RayActorError: it is gone"):
            actor.call("work").result()
    cluster.close()
