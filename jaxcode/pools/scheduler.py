"""Assigns the shares of requests to workers, and has workers compile for batches beforehand.

One thread makes all decisions and handles events one after the other: a request, an answer, a death, a timer. Slow work
is done on other threads: in workers, and in the threads that wait for their requests.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, final

import jax
import numpy as np
from jaxtyping import PyTree

from .compute import Signature, find_invalid
from .event_loop import EventLoop
from .request import Request
from .responses import Fault, PoolClosed
from .supervisor import Supervisor, WorkerDied
from .worker import AbstractWorker

log = logging.getLogger("jaxcode.pools")


@final
class Scheduler:
    """Assigns shares of requests to the workers that a `Supervisor` keeps running.

    Args:
        workers: One object for each worker, not started.
        examples: Signatures that all workers compile for when they are started.
        stuck_after: Seconds after which a worker that has not answered a call is replaced; None for never.
        start_limit: Seconds that a worker may take to start, and to compile.
    """

    def __init__(
        self,
        workers: Sequence[AbstractWorker],
        examples: Sequence[Signature],
        *,
        stuck_after: float | None,
        start_limit: float,
    ):
        self._workers, self._start_limit = workers, start_limit
        self._loop = EventLoop("jaxcode scheduler", self._shut_down)
        self._supervisor = Supervisor(
            self._loop,
            workers,
            prepare=self._prepare,
            on_ready=self._on_ready,
            on_death=self._on_death,
            on_change=self._on_change,
            stuck_after=stuck_after,
            start_limit=start_limit,
        )
        # Oldest first.
        self._requests: list[Request] = []
        self._counters = {"answers": 0, "late": 0, "raised": 0, "invalid": 0}
        self._is_hedging = False
        self._startup = _Milestone("be started")
        self._milestones = [self._startup]
        # What workers compile for when they are restarted.
        self._examples = list(examples)
        # What the process of each worker has compiled for, and the signatures whose compilation was logged.
        self._compiled_signatures: list[set[Signature]] = [set() for _ in workers]
        self._logged_signatures: set[Signature] = set()

    # ---- called from any thread ----------------------------------------------------------------------------

    def start(self, on_ready: Callable[[], object]) -> None:
        """Starts all workers and waits for them; those that take too long join later.

        Args:
            on_ready: Called for each worker that is ready.

        Raises:
            RuntimeError: If none can be started.
            PoolClosed: If the pool is closed before.
        """
        self._startup.on_ready = on_ready
        self._loop.post(self._supervisor.start)
        self._wait(self._startup)

    def warm_up(self, example: Signature) -> None:
        """Compiles for such batches on all workers and waits for those that run; others do so when started.

        Raises:
            RuntimeError: If no worker can compute such a batch within the limit. Restarted workers do not compile for
                it then.
            PoolClosed: If the pool is closed before.
        """
        self._wait(self._loop.ask(functools.partial(self._add_example, example)))

    @contextlib.contextmanager
    def schedule(self, request: Request) -> Iterator[None]:
        """Assigns the shares of a request while the context is open.

        Raises:
            PoolClosed: If the pool is closed.
        """
        if not self._loop.post(functools.partial(self._on_request, request)):
            raise PoolClosed("the pool is closed")
        try:
            yield
        finally:
            request.finish()
            self._loop.post(functools.partial(self._on_finished, request))

    def add_shares(self, request: Request, shares: PyTree[np.ndarray]) -> None:
        """Assigns the shares that a request was made without, leaves (missing, batch, ...)."""
        self._loop.post(functools.partial(self._on_shares, request, shares))

    def states(self) -> list[str]:
        """Returns the state of every worker."""
        return self._supervisor.states()

    def counters(self) -> dict[str, int]:
        """Returns the number of events of each kind."""
        return {**self._counters, **self._supervisor.counters()}

    def close(self) -> None:
        """Ends all workers; requests in flight and calls that wait for workers raise `PoolClosed`."""
        self._loop.close()

    def _wait(self, milestone):
        try:
            milestone.done.result(self._start_limit)
        except TimeoutError:
            self._loop.post(functools.partial(self._conclude, milestone))
            milestone.done.result()

    # ---- on the loop's thread: requests --------------------------------------------------------------------

    def _on_request(self, request):
        self._requests.append(request)
        self._assign()
        self._update_outlooks([request])
        if request.again_after is not None and not self._is_hedging:
            self._is_hedging = True
            self._hedge()

    def _on_shares(self, request, shares):
        request.add(shares)
        self._assign()
        self._update_outlooks([request])

    def _on_finished(self, request):
        if request in self._requests:
            self._requests.remove(request)
        for number in request.faulty_workers():
            self._supervisor.record_failure(self._supervisor.slots[number])

    def _assign(self):
        """Assigns work to idle workers: examples to compile for first, then shares, of the oldest request first."""
        requests = [request for request in self._requests if request.has_queued_shares]
        if not requests and not self._milestones:
            return
        for slot in self._supervisor.idle():
            if self._milestones and self._compile_next(slot):
                continue
            for request in requests:
                share = request.take(slot.number)
                if share is not None:
                    self._compute(slot, request, share)
                    break

    def _compute(self, slot, request, share):
        signatures = self._compiled_signatures[slot.number]
        if request.signature not in signatures:
            request.compiling_workers.add(slot.number)
            self._log_compilation(request.signature)
        submit = functools.partial(self._workers[slot.number].call, request.batch(share))
        self._supervisor.call(slot, submit, functools.partial(self._on_answer, request, share))
        self._update_outlooks([request])

    def _hedge(self):
        """Assigns shares whose answers are overdue to idle workers as well; one timer serves all requests.

        It is due four times in the shortest of their `again_after`, so a share waits at most a quarter of that longer.
        """
        requests = [(request.again_after, request) for request in self._requests if request.again_after is not None]
        idle_slots = self._supervisor.idle()
        for _, request in requests:
            if not idle_slots:
                break
            for share in request.overdue_shares():
                slot = next((slot for slot in idle_slots if request.is_allowed(slot.number)), None)
                if slot is None:
                    break
                idle_slots.remove(slot)
                request.record_assignment(share)
                self._compute(slot, request, share)
        self._is_hedging = bool(requests)
        if requests:
            self._loop.call_later(min(seconds for seconds, _ in requests) / 4, self._hedge)

    def _on_answer(self, request, share, slot, future):
        failure = future.exception()
        request.compiling_workers.discard(slot.number)
        is_late = request.is_late(share)
        if isinstance(failure, WorkerDied):
            fault = Fault(slot.number, "died", str(failure))
        elif failure is not None:
            fault = Fault(slot.number, "raised", f"{type(failure).__name__}: {failure}")
        else:
            self._compiled_signatures[slot.number].add(request.signature)
            problem = find_invalid(future.result(), request.signature.answers)
            fault = None if problem is None else Fault(slot.number, "invalid", problem)
        if fault is None:
            request.accept(share, future.result(), slot.number)
            self._counters["late" if is_late else "answers"] += 1
            self._supervisor.record_success(slot)
            self._update_outlooks([request])
            return
        if fault.kind != "died":
            self._count_fault(fault)
        request.record_fault(share, fault)
        # The failures of requests that are still listed are counted when these are finished.
        if request not in self._requests and fault.kind != "died" and slot.number in request.faulty_workers():
            self._supervisor.record_failure(slot)

    def _count_fault(self, fault):
        self._counters[fault.kind] += 1
        log.warning("worker %d %s: %s", *fault[:2], fault.message, extra={"worker": fault.worker, "kind": fault.kind})

    def _on_change(self):
        self._assign()
        self._update_outlooks([request for request in self._requests if not request.in_flight])
        self._conclude_milestones()

    def _update_outlooks(self, requests):
        for request in requests:
            request.set_outlook(self._outlook_of(request))

    def _outlook_of(self, request):
        """Returns when the request can make progress."""
        if request.in_flight or not request.is_complete:
            return "soon"
        if not request.has_queued_shares:
            return "never"
        outlook = "never"
        for slot in self._supervisor.slots:
            if request.is_allowed(slot.number):
                if slot.state in ("idle", "busy"):
                    return "soon"
                outlook = "later"
        return outlook

    # ---- on the loop's thread: workers ---------------------------------------------------------------------

    def _prepare(self, slot):
        """Compiles on a worker that has just been started for the examples that restarted workers compile for."""
        for request in self._requests:
            request.allow(slot.number)
        self._compiled_signatures[slot.number] = set()
        examples = list(self._examples)
        return _map_future(self._workers[slot.number].warm_up([example.batch for example in examples]), examples)

    def _on_ready(self, slot, examples):
        self._compiled_signatures[slot.number].update(examples)
        for milestone in self._milestones:
            if milestone.example is None or milestone.example in examples:
                milestone.record_ready(slot.number)
        self._conclude_milestones()

    def _on_death(self, slot, failure):
        for milestone in self._milestones:
            milestone.record_failure(slot.number, failure)
        self._conclude_milestones()

    def _add_example(self, example):
        """Returns the milestone at which all workers have compiled for such batches."""
        milestone = next((milestone for milestone in self._milestones if milestone.example is example), None)
        if milestone is None:
            milestone = _Milestone("compute such a batch", example)
            milestone.ready.update(
                number for number, signatures in enumerate(self._compiled_signatures) if example in signatures
            )
            self._milestones.append(milestone)
            if milestone.ready and example not in self._examples:
                self._examples.append(example)
            self._on_change()
        return milestone

    def _compile_next(self, slot):
        """Compiles on an idle worker for an example that it has not tried; returns whether there is one."""
        for milestone in self._milestones:
            if milestone.example is not None and not milestone.has_tried(slot.number):
                submit = functools.partial(self._workers[slot.number].warm_up, [milestone.example.batch])
                self._supervisor.call(slot, submit, functools.partial(self._on_compiled, milestone))
                return True
        return False

    def _on_compiled(self, milestone, slot, future):
        failure = future.exception()
        if failure is None:
            self._compiled_signatures[slot.number].add(milestone.example)
            milestone.record_ready(slot.number)
            if milestone.example not in self._examples:
                self._examples.append(milestone.example)
        elif not isinstance(failure, WorkerDied):
            # Perhaps f cannot be computed on the example: this does not count among the worker's failures.
            self._count_fault(Fault(slot.number, "raised", f"{type(failure).__name__}: {failure}"))
            milestone.record_failure(slot.number, failure)
        self._conclude_milestones()

    def _conclude_milestones(self):
        """Concludes the milestones that every worker that is not quarantined has taken or failed at."""
        for milestone in list(self._milestones):
            running_slots = [slot for slot in self._supervisor.slots if slot.state != "quarantined"]
            if milestone.is_attempted and all(milestone.has_tried(slot.number) for slot in running_slots):
                self._conclude(milestone)

    def _conclude(self, milestone):
        if milestone in self._milestones:
            self._milestones.remove(milestone)
            milestone.conclude(self._start_limit)

    def _log_compilation(self, signature):
        if signature not in self._logged_signatures:
            self._logged_signatures.add(signature)
            num_workers = sum(signature not in signatures for signatures in self._compiled_signatures)
            shapes = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(signature.batch))
            log.warning(
                "compiling for batches of %s on up to %d workers during a request; warm_up does so beforehand",
                shapes,
                num_workers,
                extra={"kind": "compiling"},
            )

    def _shut_down(self):
        failure = PoolClosed("the pool was closed during the request")
        for request in self._requests:
            request.fail(failure)
        for milestone in self._milestones:
            milestone.done.set_exception(PoolClosed("the pool was closed before its workers were ready"))
        self._supervisor.close()


@final
class _Milestone:
    """Tracks a step that every worker takes once: starting, or compiling for an example.

    Attributes:
        name: A verb that completes "no worker could ..." in errors.
        example: The signature that workers compile for; None for starting.
        ready: Workers that have taken the step.
        failures: Exceptions of the workers that failed at it.
        done: A future that is done when all running workers have tried.
        on_ready: Called for each worker that has taken the step.
    """

    def __init__(self, name: str, example: Signature | None = None):
        self.name, self.example = name, example
        self.ready: set[int] = set()
        self.failures: dict[int, Exception] = {}
        self.done: Future[None] = Future()
        self.on_ready: Callable[[], object] = lambda: None

    @property
    def is_attempted(self) -> bool:
        """Returns whether any worker has tried."""
        return bool(self.ready or self.failures)

    def has_tried(self, number: int) -> bool:
        """Returns whether this worker has tried."""
        return number in self.ready or number in self.failures

    def record_ready(self, number: int) -> None:
        """Records that a worker has taken the step."""
        if number not in self.ready:
            self.ready.add(number)
            self.on_ready()

    def record_failure(self, number: int, failure: Exception) -> None:
        """Records that a worker has failed at the step, unless it has taken it before."""
        if number not in self.ready:
            self.failures[number] = failure

    def conclude(self, limit: float) -> None:
        """Completes `done`: with an error if no worker has taken the step within the limit in seconds."""
        if self.ready:
            self.done.set_result(None)
            return
        cause = next(iter(self.failures.values()), None)
        problem = RuntimeError(f"no worker could {self.name} within {limit} s{'' if cause is None else f': {cause}'}")
        problem.__cause__ = cause
        self.done.set_exception(problem)


def _map_future(future, value):
    """Returns a future of this value, which waits for another future and fails where that fails."""
    outcome: Future[Any] = Future()

    def transfer(source):
        failure = source.exception()
        if failure is None:
            outcome.set_result(value)
        else:
            outcome.set_exception(failure)

    future.add_done_callback(transfer)
    return outcome
