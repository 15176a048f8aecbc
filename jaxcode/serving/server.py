"""The loop that keeps answering: encode, send, wait by a policy, decode from whoever replied."""

import asyncio
import bisect
import dataclasses
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree

from ._groups import decode_groups, encode_groups, fill_up, in_the_callers_order, known_decoders
from .checks import batch_size
from .codes.abstract import AbstractInterpolatingCode, AbstractLinearCode
from .codes.spline import SplineCode
from .ordering import Ordering
from .outputs import OutputSpace, as_returned
from .robust import Defence, Suspicion
from .stop import AbstractStop, answers
from .workers.pool import AbstractPool
from .workers.responses import Fault, NotEnoughAnswers

log = logging.getLogger("jaxcode.serving")
log.addHandler(logging.NullHandler())

# Upper ends of the latency histogram's classes, in seconds.
LATENCY_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What came of a request.

    Attributes:
        values: Results in the caller's order, NumPy arrays, leaves (B, ...).
        returned: To which coded inputs the answers came that they were decoded from, bool, shape (N,).
        latency: Seconds from the request to this answer.
        error: Predicted error of each input, shape (B,): root mean square over its outputs of the standard errors of
            `SplineCode.decode_with_error`, in the space in which answers are decoded; infinite where nothing can be
            said. None where the code predicts none.
        faults: What went wrong with workers.
        suspicion: Whom the defence did not believe, if there is one.
    """

    values: PyTree[np.ndarray]
    returned: Bool[np.ndarray, "workers"]
    latency: float
    error: Float[np.ndarray, "batch"] | None
    faults: tuple[Fault, ...]
    suspicion: Suspicion | None


class CodedServer:
    r"""Answers batches from whichever of the pool's workers reply.

    A batch is ordered, cut into groups of K and encoded; workers that are free compute f on the N coded inputs of all
    groups, and when the policy says stop the results are decoded from what came. Workers that are slow, dead, stuck or
    wrong make an answer less exact, not late.

    Batches that make another number of groups have everything compiled again: `warm_up` does that beforehand.

    Args:
        code: Whose N coded inputs are computed by whichever of the pool's workers are free; usually there are N too.
        pool: Whose workers compute f. The server does not close it.
        stop: When answers are enough, such as `stop.answers(25) | stop.deadline(0.2)`. Before the code can decode every
            input the policy is not asked, and it is over where nobody who could answer soon is left.
        time_limit: Seconds after which a request is answered from what came, or refused.
        order: As for `jaxcode.coded`.
        output: As for `jaxcode.coded`.
        defence: As for `jaxcode.coded`. Answers that are not finite never count as returned.
        again_after: Seconds after which coded inputs that have no answer are given to another worker too, if one is
            free; never if not given.
        predict_error: Whether answers carry their predicted error, which costs some milliseconds; where the code
            predicts any if not given.
        max_in_flight: How many requests `submit` and `asynchronously` work on at a time.

    Raises:
        ValueError: If stop can never be reached, or a number or the code is not what it should be.

    >>> from jaxcode import SplineCode, stop
    >>> from jaxcode.workers import ThreadPool
    >>> code = SplineCode.chebyshev(num_data=4, num_workers=12)
    >>> with ThreadPool(jnp.sin, num_workers=12) as pool:
    ...     server = CodedServer(code, pool, stop.answers(9))
    ...     answer = server(np.linspace(0.0, 1.0, 4, dtype=np.float32))
    >>> int(answer.returned.sum()) >= 9, bool(np.max(np.abs(answer.values - np.sin(np.linspace(0.0, 1.0, 4)))) < 0.01)
    (True, True)
    """

    def __init__(
        self,
        code: AbstractLinearCode,
        pool: AbstractPool,
        stop: AbstractStop,
        *,
        time_limit: float = 30.0,
        order: Ordering | None = None,
        output: OutputSpace = as_returned,
        defence: Defence | None = None,
        again_after: float | None = None,
        predict_error: bool | None = None,
        max_in_flight: int = 8,
    ):
        predicts = isinstance(code, SplineCode) if predict_error is None else predict_error
        if predicts and not isinstance(code, SplineCode):
            raise ValueError(f"predict_error is True, but {type(code).__name__} predicts none; expected a SplineCode")
        stop.check(code.num_workers, predicts)
        for name, seconds in (("time_limit", time_limit), ("again_after", again_after)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} is {seconds!r}; expected seconds, above zero")
        self._code, self._pool, self._stop, self._time_limit = code, pool, stop, float(time_limit)
        self._again_after, self._shares = again_after, most_telling_first(code)
        self._predicts = predicts
        self._steps = _Steps(code, order, output, defence)
        self._executor = ThreadPoolExecutor(max_in_flight, thread_name_prefix="jaxcode request")
        self._tally = _Tally()

    def __call__(self, x: PyTree[Any]) -> Answer:
        """Answers a batch, leaves (B, ...).

        Raises:
            NotEnoughAnswers: If too few workers answered within the time limit.
            PoolClosed: If the pool is closed.
            ValueError: As `jaxcode.coded`'s predict does.
        """
        began = time.monotonic()
        size = batch_size("x", x)
        sent, cut = self._steps.encode(self._filled(x, size))
        error = self._predicted_error(cut) if self._predicts else None
        try:
            responses = self._pool.run(
                sent,
                self._stop,
                time_limit=max(0.0, self._time_limit - (time.monotonic() - began)),
                enough=self._steps.enough,
                error=error,
                order=self._shares,
                again_after=self._again_after,
            )
        except NotEnoughAnswers as refusal:
            self._tally.refused()
            log.warning("refused: %s", refusal, extra={"kind": "refused", "batch": size})
            raise
        values, suspicion = self._steps.decode(responses.values, responses.returned, cut)
        returned = responses.returned if suspicion is None else np.asarray(suspicion.returned)
        answer = Answer(
            values=jax.tree.map(lambda leaf: np.asarray(leaf)[:size], values),
            returned=returned,
            latency=0.0,
            error=None if error is None else error(responses.values, returned)[:size],
            faults=responses.faults,
            suspicion=suspicion,
        )
        answer = dataclasses.replace(answer, latency=time.monotonic() - began)
        self._tally.answered(answer)
        log.info(
            "answered",
            extra={"kind": "answered", "batch": size, "answers": int(returned.sum()), "seconds": answer.latency},
        )
        return answer

    def submit(self, x: PyTree[Any]) -> Future[Answer]:
        """Answers a batch in the background; at most `max_in_flight` at a time, others wait for their turn."""
        return self._executor.submit(self, x)

    async def asynchronously(self, x: PyTree[Any]) -> Answer:
        """Answers a batch without blocking the event loop."""
        return await asyncio.wrap_future(self.submit(x))

    def warm_up(self, x: PyTree[Any]) -> None:
        """Compiles everything, here and in the workers, for batches like x; workers started later do so too.

        Args:
            x: Leaves (B, ...), of which only shapes and dtypes count.
        """
        zeros = jax.tree.map(lambda leaf: np.zeros(np.shape(leaf), leaf.dtype), x)
        sent, cut = self._steps.encode(self._filled(zeros, batch_size("x", x)))
        self._pool.warm_up(jax.tree.map(lambda leaf: leaf[0], sent))
        values = self._pool.run(sent, answers(1), time_limit=self._time_limit, enough=lambda returned: True).values
        # Where everyone answered, decoding may be another program.
        for returned in np.arange(self._code.num_workers) >= np.arange(2)[:, None]:
            self._steps.enough(returned)
            self._steps.decode(values, returned, cut)
            if self._predicts:
                self._steps.error(values, returned, cut)

    def counters(self) -> dict[str, Any]:
        """What happened since the server was made.

        Requests "answered" and "refused"; coded inputs that were not waited for, of all answered requests together
        ("stragglers"); how many answers took at most so many seconds ("latency", by the upper end, and "latency_sum" in
        all); and since the pool was made, "workers": its own counters.
        """
        return {**self._tally.counters(), "workers": self._pool.counters()}

    def register_metrics(self, registry: Any = None) -> None:
        """Shows the counters to Prometheus, as metrics named jaxcode_...; read whenever they are collected.

        Args:
            registry: A `prometheus_client` registry; its default one if not given.

        Raises:
            ImportError: If prometheus-client is not installed.
        """
        from ._prometheus import register

        register(self, self._pool, registry)

    def close(self) -> None:
        """Waits for what was submitted, and takes no more of it. The pool stays open."""
        self._executor.shutdown()

    def _filled(self, x, size):
        """The batch made up to whole groups before it is traced, so that fewer shapes are compiled for."""
        if size % self._code.num_data == 0:
            return jax.tree.map(jnp.asarray, x)
        return jax.tree.map(lambda leaf: fill_up(np.asarray(leaf), self._code.num_data), x)

    def _predicted_error(self, cut):
        """The error that is predicted from values and whose they are; computed once for the same."""
        known = {}

        def error(values, returned):
            mask = returned.tobytes()
            if mask not in known:
                known[mask] = np.asarray(self._steps.error(values, returned, cut))
            return known[mask]

        return error


def most_telling_first(code: AbstractLinearCode) -> list[int]:
    """In which order workers' coded inputs are given out while fewer workers are free than there are.

    First one for each input that is itself computed somewhere, whose answer is then exact; then, one after the other,
    the node that is farthest from all before it. Codes without nodes keep their order.
    """
    if not isinstance(code, AbstractInterpolatingCode):
        return list(range(code.num_workers))
    beta, alpha = np.asarray(code.worker_nodes, np.float64), np.asarray(code.data_nodes, np.float64)
    nearest = np.abs(beta[:, None] - alpha).argmin(axis=0)
    order = np.unique(nearest[np.abs(beta[nearest] - alpha) < 1e-9]).tolist() or [0]
    # Nodes crowd towards the ends in equal angles.
    middle, radius = (beta[-1] + beta[0]) / 2, (beta[-1] - beta[0]) / 2
    angle = np.arccos(np.clip((beta - middle) / radius, -1, 1))
    distance = np.abs(angle[:, None] - angle[order]).min(axis=1)
    distance[order] = -1
    while len(order) < len(beta):
        order.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(angle - angle[order[-1]]))
        distance[order] = -1
    return order


class _Steps:
    """What happens on the host's own device: compiled once for each shape of batch, whoever returned."""

    def __init__(self, code, order, output, defence):
        encoder, num_data, num_workers = code.encoder_map(), code.num_data, code.num_workers

        def by_group(values, cut):
            """From leaves (N, groups, ...) to leaves (groups N, ...)."""
            swapped = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), values)
            return jax.tree.map(lambda leaf: leaf.reshape(cut.num_groups * num_workers, *leaf.shape[2:]), swapped)

        @jax.jit
        def encode(x):
            sent, cut = encode_groups(encoder, num_data, order, x)
            by_worker = jax.tree.map(
                lambda leaf: jnp.swapaxes(leaf.reshape(cut.num_groups, num_workers, *leaf.shape[1:]), 0, 1), sent
            )
            return by_worker, cut

        @jax.jit
        def decode(values, decoder, returned, cut):
            return decode_groups(code, decoder, by_group(values, cut), returned, cut, output, defence)

        @jax.jit
        def error(values, returned, cut):
            answers = output.of_answers(by_group(values, cut))
            rows = jax.tree.map(lambda leaf: jnp.swapaxes(leaf.reshape(cut.num_groups, num_workers, -1), 0, 1), answers)
            _, errors = code.decode_with_error(rows, returned)
            squares = jnp.concatenate([jnp.square(leaf) for leaf in jax.tree.leaves(errors)], axis=-1)
            of_inputs = jnp.sqrt(jnp.mean(squares, axis=-1)).T.reshape(cut.num_groups * num_data)
            return in_the_callers_order(of_inputs, cut)

        known = known_decoders(code)
        self.encode, self.error = encode, error
        self.decode = lambda values, returned, cut: decode(
            values, known(returned) if defence is None else None, returned, cut
        )
        self.enough = lambda returned: bool(np.all(code.recovered(returned)))


class _Tally:
    """Counters that several threads write."""

    def __init__(self):
        self._lock = threading.Lock()
        self._answered = self._refused = self._stragglers = 0
        self._latency_sum = 0.0
        self._latency = [0] * (len(LATENCY_BOUNDS) + 1)

    def answered(self, answer: Answer) -> None:
        with self._lock:
            self._answered += 1
            self._stragglers += int(np.sum(~answer.returned))
            self._latency_sum += answer.latency
            self._latency[bisect.bisect_left(LATENCY_BOUNDS, answer.latency)] += 1

    def refused(self) -> None:
        with self._lock:
            self._refused += 1

    def counters(self) -> dict[str, Any]:
        with self._lock:
            upto = np.cumsum(self._latency).tolist()
            return {
                "answered": self._answered,
                "refused": self._refused,
                "stragglers": self._stragglers,
                "latency": dict(zip((*LATENCY_BOUNDS, np.inf), upto, strict=True)),
                "latency_sum": self._latency_sum,
            }
