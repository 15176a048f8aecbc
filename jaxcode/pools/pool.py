"""A pool: workers that compute a model on the shares of requests, whose answers are used as they come."""

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
from .responses import Enough, PredictedError, Responses
from .scheduler import Scheduler
from .worker import AbstractWorker


class AbstractPool(abc.ABC):
    """Workers that compute f on shares of requests, and may be late, wrong or dead: what a server asks of them.

    A context manager: leaving it closes the pool. Requests may be made from several threads at the same time. A share
    is assigned to whichever worker is free: none waits behind a worker that is busy, and one that is fast computes
    several. Workers that die are started again in the background; those that keep dying, or keep failing at what others
    can do, are quarantined, for twice as long each time, and then started again.
    """

    @property
    @abc.abstractmethod
    def num_workers(self) -> int:
        """How many workers there are."""

    @abc.abstractmethod
    def run(
        self,
        coded: PyTree[Any],
        stop: AbstractStop,
        *,
        time_limit: float = 30.0,
        enough: Enough = lambda returned: bool(returned.any()),
        error: PredictedError | None = None,
        order: Sequence[int] | None = None,
        again_after: float | None = None,
        began: float | None = None,
    ) -> Responses:
        """Has every share computed and gathers answers until the policy says stop.

        Args:
            coded: Leaves (N, batch, ...), N shares, of any number: f is computed on each one's batch, leaves
                (batch, ...).
            stop: When to stop waiting. Waiting also ends where no worker is left that could answer soon.
            time_limit: Seconds after which waiting ends in any case.
            enough: Whether the answers of those that returned can be decoded; before that, the policy is not asked.
            error: The predicted error from values and mask, for policies that ask for it.
            order: In which order shares are assigned, where fewer workers are free than there are shares; as they are
                numbered if not given.
            again_after: Seconds after which a share that has no answer is assigned to another worker too, if one has
                nothing else to do; the first answer counts. Never if not given. A share that went wrong, or whose
                worker died, is assigned to another in any case, once.
            began: When the request was made, as `time.monotonic` tells it, in seconds: the limit, the policy's
                deadlines and latencies count from then. Now if not given.

        Returns:
            What came.

        Raises:
            NotEnoughAnswers: If what came within the time limit is not enough, or as soon as no worker is left that
                could compute what is missing.
            PoolClosed: If the pool is or was closed.
            ValueError: If leading axes differ, order is not a permutation, stop can never be reached, f does not return
                real numbers with its batch as leading axis, or f's results under `jax_enable_x64` as it is set now
                would differ from those under the setting at which the pool was made.
        """

    @abc.abstractmethod
    def warm_up(self, example: PyTree[Any]) -> None:
        """Has every worker compile f for batches like the example, and those that are started later too.

        Args:
            example: A batch for one worker, leaves (batch, ...), arrays or `jax.ShapeDtypeStruct`s; only its shapes and
                dtypes count.

        Raises:
            RuntimeError: If no worker can compute such a batch.
            PoolClosed: If the pool is or was closed.
            ValueError: As `run`.
        """

    @abc.abstractmethod
    def states(self) -> list[str]:
        """Returns what every worker is doing: 'idle', 'busy', 'starting' or 'quarantined'."""

    @abc.abstractmethod
    def counters(self) -> dict[str, int]:
        """Returns how often what happened since the pool was made.

        Accepted "answers"; "late" ones, for which nobody waited any more; "raised" exceptions; "refused" answers;
        "deaths", "restarts" and "quarantines" of workers.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Ends all workers; requests under way raise `PoolClosed`. Closing twice does nothing more."""

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@final
class WorkerPool(AbstractPool):
    """A pool over workers of any kind: implement `AbstractWorker` for a new one.

    The setting of `jax_enable_x64` at which the pool is made is the one at which its workers compute.

    Args:
        fn: The model, a pure function of params and a batch.
        params: Its parameters.
        workers: One object for each worker, not started yet.
        example: A batch for one worker that all compile for before they are ready, as for `warm_up`; none if None.
        stuck_after: Seconds after which a worker that has not answered is replaced; None for never.
        start_limit: Seconds that workers may take to start and to compile. Those that take longer join later.
        progress: Whether to show how many have started, on standard error.
        on_close: Called once when the pool has been closed.

    Raises:
        RuntimeError: If no worker could be started.
        ValueError: If f cannot be computed on the example.
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
        coded: PyTree[Any],
        stop: AbstractStop,
        *,
        time_limit: float = 30.0,
        enough: Enough = lambda returned: bool(returned.any()),
        error: PredictedError | None = None,
        order: Sequence[int] | None = None,
        again_after: float | None = None,
        began: float | None = None,
    ) -> Responses:
        coded = jax.tree.map(np.asarray, coded)
        num_shares = batch_size("coded", coded)
        for path, leaf in jax.tree_util.tree_leaves_with_path(coded):
            if leaf.ndim < 2:
                name = f"coded{jax.tree_util.keystr(path)}"
                raise ValueError(f"{name} has shape {leaf.shape}; expected (shares, batch, ...), a batch each")
        order = range(num_shares) if order is None else order
        if sorted(order) != list(range(num_shares)):
            raise ValueError(f"order is {order}; expected the numbers of the {num_shares} shares, each once")
        stop.check(num_shares, error is not None)
        signature = self._signature(jax.tree.map(lambda leaf: leaf[0], coded))
        request = Request(coded, signature, order, again_after, began)
        with self._scheduler.working_on(request):
            return request.gather(stop, time_limit, enough, error)

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
        """Shapes and dtypes of a batch and of f's answers at the workers; checks that the caller expects the same."""
        x64 = x64_is_on()
        if x64 == self._x64:
            return self._find_signature(batch, x64)
        expected = self._find_signature(batch, x64)
        with jax.enable_x64(self._x64):
            signature = self._find_signature(batch, self._x64)
        if _dtypes(expected) != _dtypes(signature):
            raise ValueError(
                f"jax_enable_x64 is {x64} but was {self._x64} when the pool was made; f would take and return "
                f"{_dtypes(signature)}, expected {_dtypes(expected)}: make the pool and its requests under the same "
                f"setting, such as with jax.enable_x64({x64})"
            )
        return signature

    def _find_signature(self, batch, x64):
        """The signature at this setting of jax_enable_x64, which is that of now."""
        shapes = shapes_of(batch)
        leaves, structure = jax.tree.flatten(shapes)
        key = structure, tuple(leaves), x64
        if key not in self._signatures:
            # Of threads that find it missing at the same time, all take the one that is entered first.
            self._signatures.setdefault(key, Signature(shapes, answer_shapes(self._fn, self._params, shapes)))
        return self._signatures[key]


def _dtypes(signature):
    return " and ".join(
        ", ".join(str(leaf.dtype) for leaf in jax.tree.leaves(tree)) for tree in (signature.batch, signature.answers)
    )
