"""Runs the machines of a method as Ray actors: processes that hold samples and tables, and may be late or die."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..pools.compute import packed, unpacked
from ..pools.ray_actors import connect
from . import _rounds
from .method import AbstractMethod, local_shapes, prepare
from .run import DivergenceError, History, run
from .state import Common, Machine, State

log = logging.getLogger("jaxcode.saga")
log.addHandler(logging.NullHandler())

# The longest pause, in seconds, before a machine that died is started again; the first restart follows immediately.
_LONGEST_BACKOFF = 60.0

# The round of calls that are no work of a round.
_NO_ROUND = -1

# Called with a machine's number and its work of a round, a function without arguments; returns the work's result.
Around = Callable[[int, Callable[[], Any]], Any]


class NoMachines(RuntimeError):
    """Reports that no machine did its part of a round within the time limit."""


@final
class RayMachines:
    """Runs each machine of a method in a Ray actor, a process with its own samples and table.

    A round sends the parameters and the sum of messages to every machine, and receives how far each one moves the
    parameters and its new message; samples stay where they are. A round goes on without machines that are late, dead,
    or that send numbers that are not finite. The work of a late machine is discarded except for its table, of which its
    next message tells the others. A machine that died, or did not answer within the time limit, is restarted in the
    background, with a table of gradients at the current parameters.

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
        around: Called, in the machine's process, with its number and its work of a round; what it returns is the
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
        num_cpus: float = 0,
        num_gpus: float = 0,
        resources: Mapping[str, float] | None = None,
        deadline: float | None = None,
        time_limit: float = 300.0,
        start_limit: float = 300.0,
        around: Around | None = None,
    ):
        if method.mesh is not None:
            raise ValueError("method.mesh is given; expected None, as each machine is a process of its own")
        for name, seconds in (("deadline", deadline), ("time_limit", time_limit), ("start_limit", start_limit)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} is {seconds!r}; expected seconds, above zero")
        self.method, self._deadline, self._time_limit, self._start_limit = method, deadline, time_limit, start_limit
        self._around = around
        cluster = connect(address)
        self._ray, self._end = cluster.ray, cluster.close
        self._class = self._ray.remote(_Actor).options(
            num_cpus=num_cpus, num_gpus=num_gpus, resources=dict(resources or {}), max_restarts=0, max_task_retries=0
        )
        self._actors: list[Any] = []
        # Calls in progress: the machine, the round of its work or _NO_ROUND, and the time at which it counts as stuck.
        self._pending: dict[Any, tuple[int, int, float]] = {}
        # Of machines that died: how often in succession, and the time before which they are not restarted.
        self._deaths: dict[int, tuple[int, float]] = {}
        # The last failure of machines that have not answered since.
        self._failures: dict[int, str] = {}
        # Machines whose last answer was refused because it was not finite.
        self._not_finite: set[int] = set()
        # Local states and messages of a checkpoint that machines have not confirmed yet.
        self._restored: dict[int, tuple[Any, np.ndarray]] = {}

    def init(self, params: PyTree[Any], data: PyTree[Any]) -> State:
        """Starts machines, as `AbstractMethod.init`; the state's data and tables are in them.

        Raises:
            NoMachines: If no machine could be started.
            ValueError: As `AbstractMethod.init`.
        """
        params, shards, step_size = prepare(self.method, params, data)
        self._close_actors()
        self._data, self._params = jax.tree.map(np.asarray, shards), packed(params)
        # Messages are zero until machines have started.
        shape = jax.eval_shape(_rounds.begin, self.method, params, shards, step_size)["messages"]
        self._messages = np.zeros(shape.shape, shape.dtype)
        zeros = jax.device_put((self._messages[0], self._messages, np.zeros((), np.int32)))
        state = State(params, zeros[0], zeros[1], (), step_size, zeros[2], shards)
        self._actors = [None] * self.method.num_machines
        for machine in range(self.method.num_machines):
            self._start(machine, state)
        self._receive(self._start_limit, lambda: not self._pending)
        if not self._idle():
            raise NoMachines(f"no machine could be started within {self._start_limit} s: {self._reasons()}")
        return self._with_messages(state)

    def round(self, state: State, key: PRNGKeyArray) -> State:
        """Computes one round, with the machines that answer in time.

        Raises:
            NoMachines: If none does within the time limit.
            DivergenceError: If all answers are refused because they are not finite.
        """
        w, unravel = ravel_pytree(state.params)
        number, sizes = int(jax.device_get(state.round)), np.asarray(state.data.sizes)
        start_time = time.monotonic()
        self._wait_for_idle(1, state, self._time_limit)
        message_sum, moves = self._messages.sum(axis=0), {}
        self._not_finite.clear()
        for machine in self._idle():
            call = self._actors[machine].work.remote(
                np.asarray(w), message_sum, number, packed(key), np.asarray(state.step_size)
            )
            self._pending[call] = machine, number, time.monotonic() + self._time_limit

        def complete():
            late = self._deadline is not None and time.monotonic() - start_time >= self._deadline
            return (late and bool(moves)) or number not in [round_ for _, round_, _ in self._pending.values()]

        self._receive(self._time_limit - (time.monotonic() - start_time), complete, moves, number)
        if not moves and self._not_finite and self._not_finite >= set(self._failures):
            raise DivergenceError(
                f"all machines that answered in round {number} sent numbers that are not finite; take shorter steps "
                f"than step_size = {float(state.step_size):.3g}, or a shorter period"
            )
        if not moves:
            raise NoMachines(f"no machine did its part of round {number}: {self._reasons()}")
        active = sum(sizes[machine] for machine in moves)
        moved = sum(move * (sizes[machine] / active) for machine, move in moves.items())
        params = unravel(w + jax.device_put(np.asarray(moved, w.dtype)))
        following = jax.device_put(np.asarray(number + 1, np.int32))
        return self._with_messages(dataclasses.replace(state, params=params, round=following))

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
        the log.

        Raises:
            NoMachines: As `round`.
            DivergenceError: As `round` and `AbstractMethod.run`.
        """

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
        self._close_actors()
        self._end()
        self._end = lambda: None

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _idle(self):
        busy = {machine for machine, _, _ in self._pending.values()}
        return [m for m, actor in enumerate(self._actors) if actor is not None and m not in busy]

    def _start(self, machine, state):
        """Starts a machine, with the local state of a checkpoint or else at the current parameters."""
        samples = jax.tree.map(lambda leaf: leaf[machine], self._data.samples)
        actor = self._class.remote(
            machine,
            self.method,
            self._params,
            samples,
            self._data.sizes[machine],
            self._data.num_samples,
            self._around,
            bool(jax.config.jax_enable_x64),  # pyright: ignore[reportAttributeAccessIssue]
        )
        self._actors[machine] = actor
        if machine in self._restored:
            call = actor.restore.remote(*self._restored[machine])
        else:
            w, _ = ravel_pytree(state.params)
            call = actor.begin.remote(np.asarray(w), np.asarray(state.step_size))
        self._pending[call] = machine, _NO_ROUND, time.monotonic() + self._start_limit

    def _restart(self, state):
        """Ends machines that are stuck, and restarts dead ones whose pause is over."""
        for call, (machine, _, limit) in list(self._pending.items()):
            if time.monotonic() >= limit:
                del self._pending[call]
                self._ray.kill(self._actors[machine])
                self._record_death(machine, TimeoutError("stuck"))
        for machine, (_, earliest) in self._deaths.items():
            if self._actors[machine] is None and time.monotonic() >= earliest:
                self._start(machine, state)

    def _wait_for_idle(self, count, state, seconds):
        """Waits until so many machines are idle, restarting dead ones; returns whether they were in time."""
        end = time.monotonic() + seconds
        self._restart(state)
        while len(self._idle()) < count and time.monotonic() < end:
            self._receive(0.2, lambda: len(self._idle()) >= count)
            if not self._pending:
                time.sleep(0.05)
            self._restart(state)
        return len(self._idle()) >= count

    def _receive(self, seconds, complete, moves=None, number=None, locals_=None):
        """Receives answers until complete() or for so many seconds.

        Args:
            seconds: How long, at most.
            complete: Whether enough has been received.
            moves: Where to put moves of the round of that number, by machine.
            number: The number.
            locals_: Where to put local states, by machine.
        """
        end = time.monotonic() + seconds
        while not complete() and self._pending and time.monotonic() < end:
            done, _ = self._ray.wait(
                list(self._pending), num_returns=1, timeout=min(0.05, max(0.0, end - time.monotonic()))
            )
            for call in done:
                machine, round_, _ = self._pending.pop(call)
                try:
                    kind, value, message = self._ray.get(call)
                except self._ray.exceptions.RayTaskError as failure:
                    cause = failure.cause or failure
                    if round_ == _NO_ROUND:
                        self._ray.kill(self._actors[machine])
                        self._record_death(machine, cause)
                    else:
                        self._record_failure(machine, "raised", cause)
                    continue
                except self._ray.exceptions.RayError as failure:
                    self._record_death(machine, failure)
                    continue
                if machine in self._restored and kind != "restore":
                    self._send_restored(machine)
                    continue
                if not all(np.isfinite(part).all() for part in (message, *([value] if kind == "work" else []))):
                    # The machine has kept its last local state and message.
                    self._not_finite.add(machine)
                    self._record_failure(machine, "sent", ArithmeticError("numbers that are not finite"))
                    continue
                self._messages[machine] = message
                self._deaths.pop(machine, None)
                self._failures.pop(machine, None)
                self._restored.pop(machine, None)
                if kind == "work" and moves is not None and round_ == number:
                    moves[machine] = value
                if kind == "local" and locals_ is not None:
                    locals_[machine] = value

    def _record_death(self, machine, failure):
        self._record_failure(machine, "died of", failure)
        self._actors[machine] = None
        count, _ = self._deaths.get(machine, (0, 0.0))
        self._deaths[machine] = count + 1, time.monotonic() + min(_LONGEST_BACKOFF, 2.0**count - 1)

    def _record_failure(self, machine, what, failure):
        text = f"{what} {type(failure).__name__}: {failure}".splitlines()[0]
        log.warning("machine %d %s", machine, text, extra={"machine": machine})
        self._failures[machine] = text

    def _reasons(self):
        late = {machine: "has not answered" for machine, _, _ in self._pending.values()}
        reasons = sorted({**late, **self._failures}.items())
        return "; ".join(f"machine {machine} {text}" for machine, text in reasons[:4])

    def _template(self, state):
        """Returns the state with zeros for machines' local states."""
        shapes = local_shapes(self.method, state)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        return dataclasses.replace(state, local=jax.device_put(zeros))

    def _collect(self, state):
        """Returns the state with machines' local states, None if not all machines answer in time."""
        count, locals_ = len(self._actors), {}
        end = time.monotonic() + self._time_limit + self._start_limit
        while len(locals_) < count:
            if not self._wait_for_idle(count, state, end - time.monotonic()):
                log.warning("no checkpoint of round %d, as not all machines answered: %s", state.round, self._reasons())
                return None
            # All of them again: one that was restarted has a new message.
            locals_.clear()
            for machine in range(count):
                call = self._actors[machine].local.remote()
                self._pending[call] = machine, _NO_ROUND, time.monotonic() + self._time_limit
            self._receive(min(self._time_limit, end - time.monotonic()), lambda: not self._pending, locals_=locals_)
        local = jax.tree.map(lambda *leaves: np.stack(leaves), *[locals_[machine] for machine in range(count)])
        return self._with_messages(dataclasses.replace(state, local=jax.device_put(local)))

    def _distribute(self, state):
        """Sends local states and messages of a checkpoint to machines."""
        self._messages = np.array(state.messages)
        for machine in range(len(self._actors)):
            local = jax.tree.map(lambda leaf, machine=machine: np.asarray(leaf[machine]), state.local)
            self._restored[machine] = local, self._messages[machine].copy()
        state = dataclasses.replace(state, local=())
        for machine in self._idle():
            self._send_restored(machine)
        # A machine that dies or is late now gets its state when it is restarted or answers, and joins a later round.
        self._receive(self._time_limit, lambda: not self._restored)
        return state

    def _send_restored(self, machine):
        call = self._actors[machine].restore.remote(*self._restored[machine])
        self._pending[call] = machine, _NO_ROUND, time.monotonic() + self._time_limit

    def _with_messages(self, state):
        message_sum, messages = jax.device_put((self._messages.sum(axis=0), self._messages.copy()))
        return dataclasses.replace(state, message_sum=message_sum, messages=messages)

    def _close_actors(self):
        for actor in self._actors:
            if actor is not None:
                self._ray.kill(actor)
        self._actors, self._pending, self._deaths, self._failures = [], {}, {}, {}
        self._not_finite, self._restored = set(), {}


class _Actor:
    """Computes one machine's work in a process of its own.

    Every method returns which answer it is ("begin", "work", "local" or "restore"), a value and the machine's message.
    """

    def __init__(self, number, method, params, samples, size, num_samples, around, x64):
        jax.config.update("jax_enable_x64", x64)
        _, unravel = ravel_pytree(unpacked(params))
        samples, size = jax.tree.map(jnp.asarray, samples), jnp.asarray(size)

        def machine(message, local, dtype):
            return Machine(message, local, samples, size, jnp.ones((), dtype))

        def begin(w, step_size):
            common = Common(w, None, step_size, jnp.zeros((), jnp.int32), unravel, num_samples)
            return _rounds.with_dtype(method, w.dtype).begin(common, machine(None, None, w.dtype))

        def work(w, message_sum, step_size, rounds, key, message, local):
            common = Common(w, message_sum, step_size, rounds, unravel, num_samples)
            machine_key = jax.random.fold_in(jax.random.fold_in(key, rounds), number)
            return _rounds.with_dtype(method, w.dtype).work(common, machine(message, local, w.dtype), machine_key)

        self._begin, self._work = jax.jit(begin), jax.jit(work)
        self._number, self._around = number, around

    def begin(self, w, step_size):
        self._local, self._message = self._begin(w, step_size)
        return "begin", None, np.asarray(self._message)

    def work(self, w, message_sum, rounds, key, step_size):
        def compute():
            rounds_ = jnp.asarray(rounds, jnp.int32)
            return self._work(w, message_sum, step_size, rounds_, unpacked(key), self._message, self._local)

        move, local, message = compute() if self._around is None else self._around(self._number, compute)
        parts = [np.asarray(part) for part in (move, message, *jax.tree.leaves(local))]
        if not all(np.isfinite(part).all() for part in parts if jnp.issubdtype(part.dtype, jnp.floating)):
            # What was valid before remains so; the answer is refused.
            return "work", np.full_like(np.asarray(move), np.nan), np.asarray(self._message)
        self._local, self._message = local, message
        return "work", np.asarray(move), np.asarray(message)

    def local(self):
        return "local", jax.tree.map(np.asarray, self._local), np.asarray(self._message)

    def restore(self, local, message):
        self._local, self._message = jax.tree.map(jnp.asarray, local), jnp.asarray(message)
        return "restore", None, np.asarray(message)
