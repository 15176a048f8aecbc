"""What every pool of real workers does."""

import abc
from collections.abc import Sequence
from typing import Any

from jaxtyping import PyTree

from ..stop import AbstractStop
from ._host import Host
from .responses import Enough, PredictedError, Responses


class AbstractPool(abc.ABC):
    """Workers that compute f on shares of requests, and may be late, wrong or dead.

    A context manager: leaving it closes the pool. Requests may be made from several threads at once. A share is given
    to whoever is free: nobody waits behind a worker that is busy, and one that is fast computes several. Workers that
    die are started anew in the background, and those that keep failing rest for a while, each time longer.

    Attributes:
        num_workers: How many there are.
    """

    num_workers: int
    _host: Host

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
    ) -> Responses:
        """Has every share computed and gathers answers until the policy says stop.

        Args:
            coded: Leaves (N, batch, ...), N shares, of any number: f is computed on each one's batch, leaves
                (batch, ...).
            stop: When to stop waiting. It also ends where nobody who could answer soon is left.
            time_limit: Seconds after which waiting ends in any case.
            enough: Whether the answers of those that returned can be used at all; before that, the policy is not asked.
            error: The predicted error from values and whose they are, for policies that ask for it.
            order: In which order shares are given out, where fewer workers are free than there are shares; as they are
                numbered if not given.
            again_after: Seconds after which a share that has no answer is given to another worker too, if one is free;
                the first answer counts. Never if not given. A share that went wrong, or whose worker died, is given to
                another in any case, once.

        Returns:
            What came.

        Raises:
            NotEnoughAnswers: If what came within the time limit is not enough.
            PoolClosed: If the pool is or was closed.
            ValueError: If leading axes differ, order is not a permutation, stop can never be reached, or f does not
                return real numbers with its batch as leading axis.
        """
        return self._host.run(coded, stop, time_limit, enough, error, order, again_after)

    def warm_up(self, example: PyTree[Any]) -> None:
        """Has every worker compile f for batches like the example, and those that are started later too.

        Args:
            example: A batch for one worker, leaves (batch, ...), arrays or `jax.ShapeDtypeStruct`s; only its shapes
                and dtypes count.
        """
        self._host.warm_up(example)

    def states(self) -> list[str]:
        """What every worker is doing: 'idle', 'busy', 'starting' or 'resting'."""
        return self._host.dispatcher.states()

    def counters(self) -> dict[str, int]:
        """How often what happened since the pool was made.

        Answers accepted; late ones, which nobody waited for any more; raised, refused, deaths, restarts; rests, of
        workers that kept failing.
        """
        return self._host.dispatcher.counters()

    def close(self) -> None:
        """Ends all workers; requests under way raise `PoolClosed`. Once closed, closing does nothing."""
        self._host.dispatcher.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()
