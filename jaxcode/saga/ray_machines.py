"""Machines that are Ray actors: processes that hold samples and tables, some of them late or dead."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..pools.compute import packed, unpacked
from ..pools.ray_actors import connect
from .method import AbstractMethod, begin
from .run import History, run
from .state import Common, Machine, State

log = logging.getLogger("jaxcode.saga")
log.addHandler(logging.NullHandler())

# Seconds from one death to the next attempt, at most; the first follows at once.
_LONGEST_WAIT = 60.0

# Called with a machine's number and its work of a round: what it does in place of just working.
Around = Callable[[int, Callable[[], Any]], Any]


class NoMachines(RuntimeError):
    """No machine did its part of a round within the time limit."""


class RayMachines:
    """A method's machines as Ray actors, each a process with its own samples and table.

    A round sends every machine the parameters and what all told, and receives how far it went and what it tells; its
    samples stay where they are. A round goes on without machines that are late or dead. The work of one that is late is
    dropped but for its table, of which it tells as soon as it can; one that died, or has not answered within the time
    limit, is started anew in the background, and rejoins with a table of gradients at the parameters of then.

    Without an address, and unless Ray runs in this process already, a cluster of this machine alone is started, which
    listens on the loopback interface only, and is ended with the machines. A context manager; leaving it ends them.

    Args:
        method: What they do. For the same key its results are those of the method itself, but for rounding, while
            nobody is late.
        address: As for `jaxcode.pools.RayPool`, as are num_cpus, num_gpus and resources.
        deadline: Seconds after which a round goes on without those that have not answered, once someone has; None to
            wait for all that are alive.
        time_limit: Seconds after which a round that nobody answered is given up, and a machine that is stuck.
        start_limit: Seconds that machines may take to start.
        around: Called with a machine's number and its work of a round; what it returns is the answer. To rehearse
            delays and faults; runs in the machine's process.

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
        # Calls under way: whose, of which round, -1 where a machine is being started, and until when.
        self._pending: dict[Any, tuple[int, int, float]] = {}
        # Of machines that died: how often in a row, and not before when they are started anew.
        self._died: dict[int, tuple[int, float]] = {}
        # What went wrong last with machines since they last answered.
        self._troubles: dict[int, str] = {}

    def init(self, params: PyTree[Array], data: PyTree[Any]) -> State:
        """As `AbstractMethod.init`; the state's data and tables are in the machines.

        Raises:
            NoMachines: If no machine could be started.
            ValueError: As `AbstractMethod.init`.
        """
        params, shards, step_size = self.method._prepare(params, data)
        self._close_actors()
        self._data, self._params = jax.tree.map(np.asarray, shards), packed(params)
        # Nothing, until each has begun.
        shape = jax.eval_shape(begin, self.method, params, shards, step_size)["told"]
        self._told = np.zeros(shape.shape, shape.dtype)
        state = State(
            params, jnp.asarray(self._told[0]), jnp.asarray(self._told), (), step_size, jnp.zeros((), int), shards
        )
        self._actors = [None] * self.method.num_machines
        for machine in range(self.method.num_machines):
            self._start(machine, state)
        self._gather(self._start_limit, lambda: not self._pending)
        if not self._idle():
            raise NoMachines(f"no machine could be started within {self._start_limit} s: {self._why()}")
        return self._heard(state)

    def round(self, state: State, key: PRNGKeyArray) -> State:
        """One round, of whoever answers in time.

        Raises:
            NoMachines: If nobody does within the time limit.
        """
        w, unravel = ravel_pytree(state.params)
        number, sizes = int(state.round), np.asarray(state.data.sizes)
        began = time.monotonic()
        self._await(1, state, self._time_limit)
        shared, moves = self._told.sum(axis=0), {}
        for machine in self._idle():
            work = self._actors[machine].work
            call = work.remote(np.asarray(w), shared, number, packed(key), np.asarray(state.step_size))
            self._pending[call] = machine, number, time.monotonic() + self._time_limit

        def over():
            late = self._deadline is not None and time.monotonic() - began >= self._deadline
            return (late and bool(moves)) or number not in [of for _, of, _ in self._pending.values()]

        self._gather(self._time_limit - (time.monotonic() - began), over, moves, number)
        if not moves:
            raise NoMachines(f"no machine did its part of round {number}: {self._why()}")
        everyone = sum(sizes[machine] for machine in moves)
        moved = sum(move * (sizes[machine] / everyone) for machine, move in moves.items())
        params = unravel(w + jnp.asarray(moved, w.dtype))
        return self._heard(dataclasses.replace(state, params=params, round=state.round + 1))

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
        """As `AbstractMethod.run`.

        Raises:
            NoMachines: As `round`.
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
            gather=self._whole if checkpoint is not None else lambda state: state,
            place=self._place if checkpoint is not None else lambda state: state,
        )

    def close(self) -> None:
        """Ends all machines. Once closed, closing does nothing."""
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
        """Has it begin at the parameters of now."""
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
        w, _ = ravel_pytree(state.params)
        call = actor.begin.remote(np.asarray(w), np.asarray(state.step_size))
        self._pending[call] = machine, -1, time.monotonic() + self._start_limit

    def _revive(self, state):
        for call, (machine, _, until) in list(self._pending.items()):
            if time.monotonic() >= until:
                self._pending.pop(call)
                self._ray.kill(self._actors[machine])
                self._lost(machine, TimeoutError("stuck"))
        for machine, (_, moment) in self._died.items():
            if self._actors[machine] is None and time.monotonic() >= moment:
                self._start(machine, state)

    def _await(self, count, state, seconds):
        """Waits until so many are idle, and starts those anew that died; whether they are in time."""
        end = time.monotonic() + seconds
        self._revive(state)
        while len(self._idle()) < count and time.monotonic() < end:
            self._gather(0.2, lambda: len(self._idle()) >= count)
            if not self._pending:
                time.sleep(0.05)
            self._revive(state)
        return len(self._idle()) >= count

    def _gather(self, seconds, over, moves=None, number=None):
        """Takes up what comes until it is over, or for so many seconds."""
        end = time.monotonic() + seconds
        while not over() and self._pending and time.monotonic() < end:
            done, _ = self._ray.wait(
                list(self._pending), num_returns=1, timeout=min(0.05, max(0.0, end - time.monotonic()))
            )
            for call in done:
                machine, of, _ = self._pending.pop(call)
                try:
                    move, self._told[machine] = self._ray.get(call)
                except self._ray.exceptions.RayTaskError as failure:
                    cause = failure.cause or failure
                    if of < 0:
                        self._lost(machine, cause)
                    else:
                        self._note(machine, "raised", cause)
                except self._ray.exceptions.RayError as failure:
                    self._lost(machine, failure)
                else:
                    self._died.pop(machine, None)
                    self._troubles.pop(machine, None)
                    if moves is not None and of == number:
                        moves[machine] = move

    def _lost(self, machine, failure):
        self._note(machine, "died of", failure)
        self._actors[machine] = None
        times, _ = self._died.get(machine, (0, 0.0))
        self._died[machine] = times + 1, time.monotonic() + min(_LONGEST_WAIT, 2.0**times - 1)

    def _note(self, machine, what, failure):
        text = f"{what} {type(failure).__name__}: {failure}".splitlines()[0]
        log.warning("machine %d %s", machine, text, extra={"machine": machine})
        self._troubles[machine] = text

    def _why(self):
        late = {machine: "has not answered" for machine, _, _ in self._pending.values()}
        troubles = sorted({**late, **self._troubles}.items())
        return "; ".join(f"machine {machine} {text}" for machine, text in troubles[:4])

    def _whole(self, state):
        """With what machines keep to themselves, once all are there."""
        if not self._await(len(self._actors), state, self._time_limit):
            raise NoMachines(f"not all machines told their tables in {self._time_limit} s: {self._why()}")
        own = self._ray.get([actor.keeps.remote() for actor in self._actors])
        own = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
        return self._heard(dataclasses.replace(state, own=own))

    def _heard(self, state):
        """With what all machines have told."""
        return dataclasses.replace(state, shared=jnp.asarray(self._told.sum(axis=0)), told=jnp.array(self._told))

    def _place(self, state):
        self._told = np.asarray(state.told).copy()
        parts = [
            jax.tree.map(lambda leaf, m=machine: np.asarray(leaf[m]), state.own) for machine in range(len(self._actors))
        ]
        self._ray.get(
            [actor.take_up.remote(own, told) for actor, own, told in zip(self._actors, parts, self._told, strict=True)]
        )
        return dataclasses.replace(state, own=())

    def _close_actors(self):
        for actor in self._actors:
            if actor is not None:
                self._ray.kill(actor)
        self._actors, self._pending, self._died, self._troubles = [], {}, {}, {}


class _Actor:
    """The machine's process."""

    def __init__(self, number, method, params, samples, size, num_samples, around, x64):
        jax.config.update("jax_enable_x64", x64)
        _, unravel = ravel_pytree(unpacked(params))
        samples, size = jax.tree.map(jnp.asarray, samples), jnp.asarray(size)

        def machine(told, own):
            return Machine(told, own, samples, size, jnp.ones(()))

        def begin(w, step_size):
            common = Common(w, None, step_size, jnp.zeros((), int), unravel, num_samples)
            return method._begin(common, machine(None, None))

        def work(w, shared, step_size, rounds, key, told, own):
            common = Common(w, shared, step_size, rounds, unravel, num_samples)
            of_machine = jax.random.fold_in(jax.random.fold_in(key, rounds), number)
            return method._work(common, machine(told, own), of_machine)

        self._begin, self._work = jax.jit(begin), jax.jit(work)
        self._number, self._around = number, around

    def begin(self, w, step_size):
        self._own, self._told = self._begin(w, step_size)
        return np.zeros_like(w), np.asarray(self._told)

    def work(self, w, shared, rounds, key, step_size):
        def compute():
            return self._work(w, shared, step_size, jnp.asarray(rounds), unpacked(key), self._told, self._own)

        move, self._own, self._told = compute() if self._around is None else self._around(self._number, compute)
        return np.asarray(move), np.asarray(self._told)

    def keeps(self):
        return jax.tree.map(np.asarray, self._own)

    def take_up(self, own, told):
        self._own, self._told = jax.tree.map(jnp.asarray, own), jnp.asarray(told)
