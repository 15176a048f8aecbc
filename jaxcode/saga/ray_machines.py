"""Runs the machines of a method as Ray actors: processes with samples and tables, which may be late or die."""

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, final

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._float64 import x64_is_on
from ..pools.compute import pack
from ..pools.event_loop import EventLoop
from ..pools.ray_actors import RayActor, connect
from ..pools.supervisor import Supervisor, WorkerDied
from . import _rounds
from ._machine_actor import Interceptor, MachineActor
from .method import AbstractMethod, local_shapes, prepare
from .run import DivergenceError, History, run
from .state import State

log = logging.getLogger("jaxcode.saga")
log.addHandler(logging.NullHandler())


class NoMachines(RuntimeError):
    """Reports that no machine did its part of a round within the time limit."""


@final
class RayMachines:
    """Runs each machine of a method in a Ray actor, a process with its own samples and table.

    A round sends the parameters and the sum of messages to every machine, and receives each one's update of the
    parameters and its new message; samples stay where they are. A round goes on without machines that are late, dead,
    or that send numbers that are not finite. The update of a late machine is discarded; its table changes, which its
    next message includes. A machine that died, raised three times in succession or did not answer within the time limit
    is restarted in the background, with a table of gradients at the current parameters.

    Without an address, and unless Ray already runs in this process, a cluster of this machine alone is started, which
    listens on the loopback interface only and ends with the machines. A context manager; leaving it ends them.

    Args:
        method: What machines compute. For the same key, results are those of the method itself except for rounding, as
            long as no machine is late.
        address: As for `jaxcode.pools.RayPool`, as are num_cpus, num_gpus and resources.
        deadline: Seconds after which a round goes on without the machines that have not answered, as soon as one has;
            None to wait for all that are alive.
        time_limit: Seconds after which a round without any answer fails, and a machine that does not answer is
            restarted.
        start_limit: Seconds that machines may take to start.
        interceptor: Called, in the machine's process, with its number and its work of a round; what it returns is the
            answer. For tests of delays and faults.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If the method's machines are spread over a mesh, or a number of seconds is not positive.

    >>> import jax.numpy as jnp
    >>> from jaxcode import saga
    >>> method = saga.DistributedSaga(saga.squared, num_machines=2, period=5, ridge=0.1)
    >>> with saga.RayMachines(method) as machines:  # doctest: +SKIP
    ...     state = machines.init(jnp.zeros(2), (x, y))
    ...     state, history = machines.run(state, jax.random.key(0), num_rounds=50)
    """

    def __init__(
        self,
        method: AbstractMethod,
        address: str | None = None,
        *,
        num_cpus: float = 0.0,
        num_gpus: float = 0.0,
        resources: Mapping[str, float] | None = None,
        deadline: float | None = None,
        time_limit: float = 300.0,
        start_limit: float = 300.0,
        interceptor: Interceptor | None = None,
    ):
        if method.mesh is not None:
            raise ValueError("method.mesh is given; expected None, as each machine is a process of its own")
        for name, seconds in (("deadline", deadline), ("time_limit", time_limit), ("start_limit", start_limit)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} is {seconds!r}; expected seconds, above zero")
        self.method, self._deadline, self._time_limit, self._start_limit = method, deadline, time_limit, start_limit
        self._interceptor = interceptor
        self._cluster = connect(address)
        self._actor_class = self._cluster.actor_class(
            MachineActor, num_cpus=num_cpus, num_gpus=num_gpus, resources=resources
        )
        self._end_machines: Callable[[], None] = lambda: None
        self._has_machines = False

    def init(self, params: PyTree[Any], data: PyTree[Any]) -> State:
        """Starts machines with their samples, as `AbstractMethod.init`; their tables are not in the state.

        Raises:
            NoMachines: If no machine could be started.
            ValueError: As `AbstractMethod.init`.
        """
        params, shards, step_size = prepare(self.method, params, data)
        self._end_machines()
        self._prepare_machines(params, shards, step_size)
        self._loop.post(self._supervisor.start)
        self._wait_until(
            lambda: all(slot.state == "idle" or slot.number in self._failures for slot in self._supervisor.slots),
            time.monotonic() + self._start_limit,
        )
        if not self._loop.ask(self._supervisor.idle):
            raise NoMachines(f"no machine could be started within {self._start_limit} s: {self._reasons()}")
        messages = self._loop.ask(self._messages.copy)
        first_round = jax.device_put(np.zeros((), np.int32))
        return State(params, local=(), step_size=step_size, round=first_round, data=shards, **_fields_of(messages))

    def round(self, state: State, key: PRNGKeyArray) -> State:
        """Computes one round, with the machines that answer in time.

        Raises:
            NoMachines: If none does within the time limit.
            DivergenceError: If all answers are refused because they are not finite.
            RuntimeError: If `init` has not been called.
        """
        self._check_machines()
        start_time = time.monotonic()
        end = start_time + self._time_limit
        w, unravel = ravel_pytree(state.params)
        round_number, sizes = int(jax.device_get(state.round)), np.asarray(state.data.sizes)
        self._start_point = np.asarray(w), np.asarray(state.step_size)
        common = *self._start_point, round_number, pack(key)
        self._wait_until(self._supervisor.idle, end)
        answers = self._loop.ask(functools.partial(self._call_work, common))
        self._wait_until(lambda: not answers.pending, min(end, start_time + (self._deadline or self._time_limit)))
        self._wait_until(lambda: answers.values or not answers.pending, end)
        # The answers of late machines may come at any time.
        updates, failures, messages = self._loop.ask(
            lambda: (dict(answers.values), list(answers.failures.values()), self._messages.copy())
        )
        if not updates and failures and all(isinstance(failure, FloatingPointError) for failure in failures):
            raise DivergenceError(
                f"all machines that answered in round {round_number} sent numbers that are not finite; take shorter "
                f"steps than step_size = {float(state.step_size):.3g}, or a shorter period"
            )
        if not updates:
            raise NoMachines(f"no machine did its part of round {round_number}: {self._reasons()}")
        active_size = sum(sizes[machine] for machine in updates)
        update = sum(updates[machine][0] * (sizes[machine] / active_size) for machine in sorted(updates))
        params = unravel(w + jax.device_put(np.asarray(update, w.dtype)))
        next_round = jax.device_put(np.asarray(round_number + 1, np.int32))
        return dataclasses.replace(state, params=params, round=next_round, **_fields_of(messages))

    def run(
        self,
        state: State,
        key: PRNGKeyArray,
        num_rounds: int,
        *,
        every: int = 1,
        evaluate: Callable[[PyTree[Array]], PyTree[Any]] | None = None,
        callbacks: Iterable[Callable[[State, dict[str, Any]], Any]] = (),
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> tuple[State, History]:
        """Computes many rounds, as `AbstractMethod.run`.

        A checkpoint needs the local states of all machines: it waits for machines that are late, and for those that are
        restarted. If they do not all answer within the time limit and the start limit, it is left out with a warning in
        the log. The local states of a checkpoint are restored within the same limits; a machine that does not answer
        by then continues with the local state that it has, or starts at the current parameters.

        Raises:
            NoMachines: As `round`.
            DivergenceError: As `round` and `AbstractMethod.run`.
            ValueError: As `AbstractMethod.run`, as is ImportError.
            RuntimeError: If `init` has not been called.
        """
        self._check_machines()

        def advance(state, count):
            for _ in range(count):
                state = self.round(state, key)
            return state

        return run(
            self.method,
            state,
            num_rounds,
            advance,
            every=every,
            evaluate=evaluate,
            callbacks=callbacks,
            checkpoint=checkpoint,
            progress=progress,
            template=self._template,
            collect=self._collect,
            distribute=self._distribute,
        )

    def close(self) -> None:
        """Ends all machines. Closing again does nothing."""
        self._end_machines()
        self._cluster.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _check_machines(self):
        if not self._has_machines:
            raise RuntimeError("no machines have been started; call init first, which starts them with their samples")

    def _wait_until(self, condition, end):
        """Waits until a condition, evaluated on the loop's thread, holds or time is up; returns whether it holds."""
        while True:
            self._change.clear()
            if self._loop.ask(condition):
                return True
            if not self._change.wait(max(0.0, end - time.monotonic())):
                return False

    def _reasons(self):
        states = self._supervisor.states()
        late_machines = {
            machine: "has not answered" for machine, state in enumerate(states) if state in ("starting", "busy")
        }
        reasons = sorted({**late_machines, **self._failures}.items())
        return "; ".join(f"machine {machine} {reason}" for machine, reason in reasons[:4])

    def _template(self, state):
        """Fills a state with zeros for machines' local states."""
        shapes = local_shapes(self.method, state)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        return dataclasses.replace(state, local=jax.device_put(zeros))

    def _collect(self, state):
        """Collects machines' local states into a state; returns None if not all machines answer in time."""
        end, count = time.monotonic() + self._time_limit + self._start_limit, self.method.num_machines
        # If one dies, all are called again: it is restarted, with another message.
        while self._wait_until(lambda: len(self._supervisor.idle()) == count, end):
            answers = self._loop.ask(lambda: self._call(self._supervisor.idle(), "local"))
            self._wait_until(lambda answers=answers: not answers.pending, end)
            if len(answers.values) == count:
                stored = [answers.values[machine] for machine in range(count)]
                local, messages = jax.tree.map(lambda *leaves: np.stack(leaves), *stored)
                return dataclasses.replace(state, local=jax.device_put(local), **_fields_of(messages))
        log.warning("no checkpoint of round %d, as not all machines answered: %s", state.round, self._reasons())
        return None

    def _distribute(self, state):
        """Sends local states and messages of a checkpoint to machines, also to those that are restarted in time."""
        end, missing = time.monotonic() + self._time_limit + self._start_limit, set(range(self.method.num_machines))
        stored = jax.tree.map(np.asarray, (state.local, state.messages))
        self._start_point = np.asarray(ravel_pytree(state.params)[0]), np.asarray(state.step_size)

        def arguments(machine):
            return jax.tree.map(lambda leaf: leaf[machine], stored)

        def missing_and_idle():
            return [slot for slot in self._supervisor.idle() if slot.number in missing]

        while missing and self._wait_until(missing_and_idle, end):
            answers = self._loop.ask(lambda: self._call(missing_and_idle(), "restore", arguments))
            self._wait_until(lambda answers=answers: not answers.pending, end)
            missing.difference_update(list(answers.values))
        if missing:
            log.warning("not all machines restored their local states of the checkpoint: %s", self._reasons())
        return dataclasses.replace(state, local=(), **_fields_of(self._loop.ask(self._messages.copy)))

    def _prepare_machines(self, params, shards, step_size):
        """Makes the machines' actors and their supervisor, without starting them."""
        messages = jax.eval_shape(_rounds.begin, self.method, params, shards, step_size)["messages"]
        # Messages are zero until machines have started. They and failures change on the loop's thread only.
        self._messages = np.zeros(messages.shape, messages.dtype)
        # The last failure of each machine that has not answered since.
        self._failures: dict[int, str] = {}
        # Set after every change, for threads that wait for a condition.
        self._change = threading.Event()
        # Parameters and step size from which machines start, those of the current round.
        self._start_point = np.asarray(ravel_pytree(params)[0]), np.asarray(step_size)
        shared_arguments = self.method, pack(params), shards.num_samples, self._interceptor, x64_is_on()
        samples, sizes = jax.tree.map(np.asarray, (shards.samples, shards.sizes))

        def arguments(machine):
            return machine, *shared_arguments, jax.tree.map(lambda leaf: leaf[machine], samples), sizes[machine]

        machines = range(self.method.num_machines)
        actors = [RayActor(self._cluster, self._actor_class, functools.partial(arguments, m)) for m in machines]
        loop = EventLoop("jaxcode saga", lambda: supervisor.close())
        supervisor = Supervisor(
            loop,
            actors,
            prepare=lambda slot: actors[slot.number].call("begin", *self._start_point),
            on_ready=self._accept,
            on_death=self._on_death,
            on_change=self._change.set,
            stuck_after=self._time_limit,
            start_limit=self._start_limit,
        )
        self._actors, self._loop, self._supervisor, self._end_machines = actors, loop, supervisor, loop.close
        self._has_machines = True

    # ---- on the loop's thread ------------------------------------------------------------------------------

    def _call_work(self, common):
        arguments = self._messages.sum(axis=0), *common
        return self._call(self._supervisor.idle(), "work", lambda machine: arguments)

    def _call(self, slots, method, arguments=lambda machine: ()):
        """Calls a method of idle actors, with each machine's arguments; returns their answers, which are to come."""
        answers = _Answers({slot.number for slot in slots})
        for slot in slots:
            submit = functools.partial(self._actors[slot.number].call, method, *arguments(slot.number))
            self._supervisor.call(slot, submit, functools.partial(self._on_answer, answers))
        return answers

    def _on_answer(self, answers, slot, future):
        failure = future.exception()
        answers.pending.discard(slot.number)
        if failure is None:
            answers.values[slot.number] = future.result()
            self._supervisor.record_success(slot)
            self._accept(slot, future.result())
            return
        answers.failures[slot.number] = failure
        if not isinstance(failure, WorkerDied):
            reason = self._failures[slot.number] = f"raised {type(failure).__name__}: {failure}".splitlines()[0]
            log.warning("machine %d %s", slot.number, reason, extra={"machine": slot.number})
            if not isinstance(failure, FloatingPointError):
                self._supervisor.record_failure(slot)

    def _on_death(self, slot, failure):
        self._failures[slot.number] = f"died: {failure}".splitlines()[0]

    def _accept(self, slot, answer):
        _, self._messages[slot.number] = answer
        self._failures.pop(slot.number, None)


@final
@dataclasses.dataclass
class _Answers:
    """Holds the answers of actors to a call; changes on the loop's thread only.

    Attributes:
        pending: Machines that may still answer.
        values: The answers of the others, a value and a message each, by machine.
        failures: The exceptions of those that failed, `WorkerDied` if they died, by machine.
    """

    pending: set[int]
    values: dict[int, tuple[Any, np.ndarray]] = dataclasses.field(default_factory=dict)
    failures: dict[int, BaseException] = dataclasses.field(default_factory=dict)


def _fields_of(messages):
    """Returns the fields of the state that hold messages and their sum."""
    message_sum, messages = jax.device_put((messages.sum(axis=0), messages))
    return {"message_sum": message_sum, "messages": messages}
