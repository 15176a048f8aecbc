"""Runs requests on a pool of workers, whose answers are used as they come."""

import abc
import sys
from collections.abc import Callable, Sequence
from typing import Any, final

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from .._float64 import x64_is_on
from ..checks import batch_size
from ..functions import PureFunction
from ..stop import AbstractStop
from .compute import Signature, answer_shapes, shapes_of
from .request import Request
from .responses import CanDecode, PredictedError, Responses, Worth
from .scheduler import Scheduler
from .worker import AbstractWorker


class AbstractPool(abc.ABC):
    """Computes f by workers that may be late, wrong or dead: the interface for servers.

    A request consists of N shares. A share is the batch that one worker computes f on at once: a server's requests have
    one share for each coded input of its code. A share is assigned to whichever worker is idle: none is queued behind a
    busy worker, and a fast worker computes several. Several threads may make requests concurrently.

    Workers that die are restarted in the background. Those that keep dying, or keep failing at shares that others can
    compute, are quarantined, for twice as long each time, and then restarted.

    A context manager: leaving it closes the pool.
    """

    @property
    @abc.abstractmethod
    def num_workers(self) -> int:
        """Returns the number of workers."""

    @abc.abstractmethod
    def run(
        self,
        shares: PyTree[Any],
        stop: AbstractStop,
        *,
        time_limit: float = 30.0,
        can_decode: CanDecode = np.any,
        error: PredictedError | None = None,
        order: Sequence[int] | None = None,
        again_after: float | None = None,
        worth: Worth | None = None,
        start_time: float | None = None,
        num_more: int = 0,
        more: Callable[[], PyTree[Any]] | None = None,
    ) -> Responses:
        """Assigns every share to a worker and gathers answers until the stop policy is met.

        Args:
            shares: N batches, or the first of them, leaves (shares, batch, ...). N need not be the number of workers.
            stop: When to stop waiting. Waiting also ends, with the answers that came, when no running worker could
                still answer.
            time_limit: Seconds after which waiting ends in any case.
            can_decode: Called with the mask of the shares that returned, bool, shape (N,); returns whether their
                answers can be decoded. The policy is asked only when they are. Any one answer if not given.
            error: Called with values and returned as in `Responses`; returns the predicted error of each input, for
                policies that need it.
            order: The numbers of `shares` in the order in which they are assigned, which matters where fewer workers
                are idle than there are shares; ascending if not given.
            again_after: Seconds after which a share without an answer is assigned to a second worker too (hedging), if
                one is idle; the first answer counts. Never if not given. A share that failed, or whose worker died, is
                assigned once more in any case.
            worth: Called with the mask of the shares that returned, on the scheduler's thread; returns how much an
                answer to each of the others is worth, shape (N,). Of overdue shares, those worth most are assigned
                again first. If not given, those assigned longest ago.
            start_time: When the request was made, a reading of `time.monotonic` in seconds, from which the limit, the
                policy's deadlines and latencies count. The time of the call if not given.
            num_more: How many shares there are besides `shares`; N counts them too.
            more: Called once the shares are on their way to workers, while these compute; returns the other shares,
                leaves (num_more, batch, ...), which are assigned after those. Not called if not given.

        Returns:
            The answers that came, and the faults.

        Raises:
            NotEnoughAnswers: If the answers that came within the time limit are not enough, or as soon as no worker is
                left that could compute the missing ones.
            PoolClosed: If the pool is or was closed.
            ValueError: If leading axes differ, order is not a permutation, stop can never be reached, f does not return
                real numbers with its batch as leading axis, or f's dtypes at the current setting of
                `jax_enable_x64` differ from those at the setting with which the pool was made.
            Exception: What f raises when it is traced for the shapes and dtypes of a share.
        """

    @abc.abstractmethod
    def warm_up(self, example: PyTree[Any]) -> None:
        """Compiles f on every worker for batches like the example, also on workers that are started later.

        Args:
            example: A batch for one worker, leaves (batch, ...), arrays or `jax.ShapeDtypeStruct`s; only its shapes and
                dtypes count.

        Raises:
            RuntimeError: If no worker can compute such a batch.
            PoolClosed: If the pool is or was closed.
            ValueError: As `run`.
            Exception: As `run`.
        """

    @abc.abstractmethod
    def states(self) -> list[str]:
        """Returns the state of every worker: 'idle', 'busy', 'starting' or 'quarantined'."""

    @abc.abstractmethod
    def counters(self) -> dict[str, int]:
        """Returns the number of events of each kind since the pool was made.

        Valid "answers" that were used; "late" ones, which no request waited for any more; "raised" exceptions;
        "invalid" answers (see `Fault`); "deaths", "restarts" and "quarantines" of workers.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Ends all workers; requests in flight raise `PoolClosed`. Closing twice does nothing more."""

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@final
class WorkerPool(AbstractPool):
    """Runs a pool of workers of any kind: implement `AbstractWorker` for a new kind.

    Its workers compute with the setting of `jax_enable_x64` with which the pool is made.

    Args:
        fn: The model, a pure function of params and a batch.
        params: Its parameters.
        workers: One object for each worker, not started.
        example: A batch for one worker that all compile for before they are ready, as for `warm_up`; none if None.
        stuck_after: Seconds after which a worker that has not answered is replaced; None for never.
        start_limit: Seconds that workers may take to start and to compile. Those that take longer join later.
        progress: Whether to show how many have started, on standard error.
        on_close: Called once when the pool has been closed.

    Raises:
        RuntimeError: If no worker could be started.
        ValueError: If f does not return real numbers with its batch as leading axis.
        Exception: What f raises when it is traced for the example.
    """

    def __init__(
        self,
        fn: PureFunction,
        params: PyTree,
        workers: Sequence[AbstractWorker],
        example: PyTree[Any] | None = None,
        *,
        stuck_after: float | None = None,
        start_limit: float = 300.0,
        progress: bool = False,
        on_close: Callable[[], object] = lambda: None,
    ):
        self._fn, self._params, self._on_close = fn, params, on_close
        self._x64 = x64_is_on()
        self._num_workers = len(workers)
        self._signatures: dict[Any, Signature] = {}
        examples = [] if example is None else [self._signature(example)]
        self._scheduler = Scheduler(workers, examples, stuck_after=stuck_after, start_limit=start_limit)
        try:
            with tqdm(total=len(workers), desc="starting workers", disable=not progress, file=sys.stderr) as bar:
                self._scheduler.start(bar.update)
        except BaseException:
            self.close()
            raise

    @property
    def num_workers(self) -> int:
        return self._num_workers

    def run(
        self,
        shares: PyTree[Any],
        stop: AbstractStop,
        *,
        time_limit: float = 30.0,
        can_decode: CanDecode = np.any,
        error: PredictedError | None = None,
        order: Sequence[int] | None = None,
        again_after: float | None = None,
        worth: Worth | None = None,
        start_time: float | None = None,
        num_more: int = 0,
        more: Callable[[], PyTree[Any]] | None = None,
    ) -> Responses:
        shares = jax.tree.map(np.asarray, shares)
        num_shares = batch_size("shares", shares)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shares):
            if leaf.ndim < 2:
                name = f"shares{jax.tree_util.keystr(path)}"
                raise ValueError(f"{name} has shape {leaf.shape}; expected (shares, batch, ...), a batch each")
        order = range(num_shares) if order is None else order
        if sorted(order) != list(range(num_shares)):
            raise ValueError(f"order is {order}; expected the numbers of the {num_shares} shares, each once")
        stop.check(num_shares + num_more, error is not None)
        signature = self._signature(jax.tree.map(lambda leaf: leaf[0], shares))
        request = Request(shares, signature, order, num_more, again_after, worth, start_time)
        with self._scheduler.schedule(request):
            if more is not None:
                others = more()
                if num_more:
                    if batch_size("more()", others) != num_more:
                        raise ValueError(f"more returned {batch_size('more()', others)} shares; expected {num_more}")
                    self._scheduler.add_shares(request, jax.tree.map(np.asarray, others))
            return request.gather(stop, time_limit, can_decode, error)

    def warm_up(self, example: PyTree[Any]) -> None:
        self._scheduler.warm_up(self._signature(example))

    def states(self) -> list[str]:
        return self._scheduler.states()

    def counters(self) -> dict[str, int]:
        return self._scheduler.counters()

    def close(self) -> None:
        self._scheduler.close()
        on_close, self._on_close = self._on_close, lambda: None
        on_close()

    def _signature(self, batch):
        """Returns the signature of a batch at the workers; checks that the caller's dtypes are the same."""
        x64 = x64_is_on()
        if x64 == self._x64:
            return self._find_signature(batch, x64)
        expected = self._find_signature(batch, x64)
        with jax.enable_x64(self._x64):
            signature = self._find_signature(batch, self._x64)
        dtypes, expected_dtypes = _describe_dtypes(signature), _describe_dtypes(expected)
        if dtypes != expected_dtypes:
            raise ValueError(
                f"jax_enable_x64 is {x64} but was {self._x64} when the pool was made; f would take and return "
                f"{dtypes}, expected {expected_dtypes}: make the pool and its requests under the same "
                f"setting, such as with jax.enable_x64({x64})"
            )
        return signature

    def _find_signature(self, batch, x64):
        """Returns the signature of a batch, stored by `x64`, which is the current setting of jax_enable_x64."""
        shapes = shapes_of(batch)
        leaves, structure = jax.tree.flatten(shapes)
        key = structure, tuple(leaves), x64
        if key not in self._signatures:
            # Threads that compute the same signature concurrently all use the object that is stored first.
            self._signatures.setdefault(key, Signature(shapes, answer_shapes(self._fn, self._params, shapes)))
        return self._signatures[key]


def _describe_dtypes(signature):
    return " and ".join(
        ", ".join(str(leaf.dtype) for leaf in jax.tree.leaves(tree)) for tree in (signature.batch, signature.answers)
    )
