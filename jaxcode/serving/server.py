"""The server: encodes a batch, has workers compute, waits as long as its policy says, decodes the answers that came."""

import asyncio
import dataclasses
import functools
import logging
import time
from concurrent.futures import Future
from typing import Any, final

import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree

from .._float64 import x64_is_on
from ..checks import batch_size, check_count, is_static
from ..codes import AbstractCode
from ..ordering import Ordering
from ..outputs import OutputSpace, as_returned
from ..pipeline import StaticCode
from ..pools import AbstractPool, Fault, NotEnoughAnswers, Responses
from ..robust import Defence, Detection
from ..stop import AbstractStop, answers
from ._codec import Codec
from ._counters import Counters
from ._dispatch import dispatch_order
from ._layout import find_finite, host_arrays, pad_inputs
from ._queue import BoundedQueue, QueueFull

log = logging.getLogger("jaxcode.serving")
log.addHandler(logging.NullHandler())


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """Holds the results of a request and what is known of their quality, in read-only NumPy arrays.

    Attributes:
        values: Results in the order of the batch, NumPy arrays, leaves (B, ...). NaN (the lowest number of an integer
            dtype) for an input that has a NaN or an infinite number.
        error: Predicted error of each input, shape (B,): root mean square over its outputs of the standard errors of
            `decode_with_error`, in the space in which answers are decoded; infinite where nothing can be said. None
            where the code predicts none.
        exact: Which results are f's own, because the input itself was computed and its answer is passed on, bool (B,).
        returned: Which coded inputs have an answer that the results were decoded from, bool, shape (N,).
        latency: Seconds from the submission of the request to this prediction, time in the queue included.
        faults: What went wrong with workers.
        detection: Which workers the defence flagged; None without a defence.
    """

    values: PyTree[np.ndarray]
    error: Float[np.ndarray, "batch"] | None
    exact: Bool[np.ndarray, "batch"]
    returned: Bool[np.ndarray, "workers"]
    latency: float
    faults: tuple[Fault, ...]
    detection: Detection | None


@final
class CodedServer:
    r"""Answers batches from whichever of the pool's workers reply.

    A batch is ordered, cut into groups of K and encoded; workers that are free compute f on the N coded inputs of all
    groups, and when the policy says stop the results are decoded from the answers that came. Workers that are slow,
    dead, stuck or faulty make a prediction less exact, not late.

    The number of groups is rounded up to a power of two, and for each such number, as for each shape of inputs,
    programs are compiled on this host and on every worker. `warm_up` does that beforehand; a request for which it was
    not done is logged, and its time limit includes the time of compiling.

    An input with a NaN or an infinite number is not encoded, as it would spoil its whole group: its own result is NaN,
    and the log names it.

    All threads compute in the precision (x64 on or off) in which the server was made.

    Args:
        code: The code. Any worker that is free computes any of its N coded inputs; usually there are N workers.
        pool: The workers that compute f. The server does not close it.
        stop: When answers are enough, such as `stop.answers(25) | stop.deadline(0.2)`. The policy is asked once the
            code can decode every input, and waiting also ends where no worker is left that could answer soon. Its
            seconds, too, count from the submission of a request.
        time_limit: Seconds from its submission after which a request is answered from what came, or refused.
        order: As for `jaxcode.coded`.
        output: As for `jaxcode.coded`.
        defence: As for `jaxcode.coded`. Answers that are not finite never count as returned.
        again_after: Seconds after which coded inputs that have no answer are given to another worker too, if one is
            free; never if not given.
        predict_error: Whether predictions carry their predicted error, which costs some milliseconds; where the code
            predicts any if not given.
        max_in_flight: How many requests `submit` and `predict_async` work on concurrently.
        max_queued: How many more of them may wait; what exceeds that is refused with `QueueFull`.

    Raises:
        ValueError: If stop can never be reached, a number is out of range, or code is no code or not a static one.

    >>> import jax.numpy as jnp
    >>> from jaxcode import SplineCode, stop
    >>> from jaxcode.pools import ThreadPool
    >>> code = SplineCode.chebyshev(num_data=4, num_workers=12)
    >>> x = np.linspace(0.0, 1.0, 4, dtype=np.float32)
    >>> with ThreadPool(jnp.sin, num_workers=12) as pool:
    ...     server = CodedServer(code, pool, stop.answers(9))
    ...     prediction = server(x)
    >>> int(prediction.returned.sum()) >= 9, bool(np.max(np.abs(prediction.values - np.sin(x))) < 0.01)
    (True, True)
    """

    def __init__(
        self,
        code: AbstractCode,
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
        max_queued: int = 64,
    ):
        if not isinstance(code, AbstractCode):
            raise ValueError(
                f"code is {code!r}; expected a code such as SplineCode.chebyshev(num_data=20, num_workers=30)"
            )
        if not is_static(code):
            raise ValueError(
                f"code is a {type(code).__name__} whose nodes or smoothing the host does not know (traced, or on an "
                "accelerator); expected a static one: make it from NumPy arrays, outside of jitted functions"
            )
        if predict_error and not code.predicts_error:
            raise ValueError(
                f"predict_error is True, but this {type(code).__name__} predicts no errors; expected a code that does, "
                "such as SplineCode.chebyshev(num_data=20, num_workers=30)"
            )
        self._predicts = code.predicts_error if predict_error is None else predict_error
        stop.check(code.num_workers, self._predicts)
        for name, seconds in (("time_limit", time_limit), ("again_after", again_after)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} is {seconds!r}; expected seconds, above zero")
        self._code, self._pool, self._stop, self._time_limit = code, pool, stop, float(time_limit)
        self._again_after, self._dispatch_order = again_after, dispatch_order(code)
        self._x64 = x64_is_on()
        self._codec = Codec(StaticCode(code), order, output, defence, self._x64)
        self._queue = BoundedQueue(
            check_count("max_in_flight", max_in_flight), check_count("max_queued", max_queued, least=0)
        )
        self._counters = Counters()
        # Structures, shapes and dtypes of padded batches for which everything is compiled.
        self._warm: set[Any] = set()

    def __call__(self, x: PyTree[Any]) -> Prediction:
        """Answers a batch, in the thread of the caller and without waiting in the queue.

        Args:
            x: The batch, leaves (B, ...).

        Raises:
            NotEnoughAnswers: If too few workers answered within the time limit.
            PoolClosed: If the pool is closed.
            ValueError: As a call of `jaxcode.coded`'s result does; if no input is finite; or if x64 is on here and was
                off where the server was made.
        """
        self._check_precision()
        return self._predict(x, time.monotonic())

    def submit(self, x: PyTree[Any]) -> Future[Prediction]:
        """Answers a batch in the background, when at most `max_in_flight` submitted before are still worked on.

        Cancelling the future of a request that waits makes room for another.

        Args:
            x: As for a call.

        Returns:
            The future, which raises what a call does.

        Raises:
            QueueFull: If `max_queued` requests wait already.
            RuntimeError: If the server is closed.
            ValueError: If x64 is on here and was off where the server was made.
        """
        self._check_precision()
        try:
            return self._queue.submit(functools.partial(self._predict, x, time.monotonic()))
        except QueueFull as problem:
            self._counters.count_rejected()
            log.warning("rejected: %s", problem, extra={"kind": "rejected"})
            raise

    async def predict_async(self, x: PyTree[Any]) -> Prediction:
        """Answers a batch without blocking the event loop; arguments, returns and errors as for `submit`."""
        return await asyncio.wrap_future(self.submit(x))

    def warm_up(self, x: PyTree[Any]) -> None:
        """Compiles everything, here and in the workers, for batches like x; workers started later do so too.

        Batches of other sizes need the same programs if their number of groups is rounded up to the same power of two.

        Args:
            x: Leaves (B, ...), arrays or `jax.ShapeDtypeStruct`, of which only shapes and dtypes are read.
        """
        self._check_precision()
        with jax.enable_x64(self._x64):
            zeros = host_arrays(jax.tree.map(lambda leaf: np.zeros(np.shape(leaf), leaf.dtype), x))
            all_finite = np.ones(batch_size("x", x), bool)
            padded = pad_inputs(zeros, all_finite, self._code.num_data)
            _, sent = self._codec.encode(padded, all_finite)
            self._pool.warm_up(jax.tree.map(lambda leaf: leaf[0], sent))
            values = self._pool.run(sent, answers(1), time_limit=self._time_limit, enough=lambda returned: True).values
            num_groups = jax.tree.leaves(sent)[0].shape[1]
            # Decoding may be another program where every worker answered. A defence reads all groups, or half of them.
            for returned in np.arange(self._code.num_workers) >= np.arange(2)[:, None]:
                for used in {num_groups, -(-num_groups // 2)}:
                    self._codec.decode(values, returned, used)
                if self._predicts:
                    self._codec.predict_errors(values, returned)
            self._warm.add(_shapes(padded))

    def counters(self) -> dict[str, Any]:
        """Returns what happened since the server was made.

        Requests "answered", "refused" for too few answers and "rejected" by a full queue; coded inputs that were not
        waited for, of all answered requests together ("stragglers"); how many predictions took at most so many seconds
        ("latency", by the upper end, and "latency_sum" in all); and since the pool was made, "workers": its own
        counters.
        """
        return {**self._counters.snapshot(), "workers": self._pool.counters()}

    def register_metrics(self, registry: Any = None) -> None:
        """Exports the counters to Prometheus, as metrics named jaxcode_...; read whenever they are collected.

        Args:
            registry: A `prometheus_client` registry; its default one if not given.

        Raises:
            ImportError: If prometheus-client is not installed.
        """
        from .prometheus import register

        register(self, self._pool, registry)

    def close(self) -> None:
        """Waits for what was submitted, and takes no more of it. The pool stays open."""
        self._queue.close()

    def _check_precision(self):
        if x64_is_on() and not self._x64:
            raise ValueError(
                "x64 is on here, but was off where the server was made, which computes in single precision; make the "
                "server and its pool with x64 on, as with jax.enable_x64(True)"
            )

    def _predict(self, x, submitted):
        """Answers a batch that was submitted at this time of `time.monotonic`."""
        with jax.enable_x64(self._x64):
            try:
                prediction = self._answer(x, submitted)
            except NotEnoughAnswers as refusal:
                self._counters.count_refused()
                log.warning("refused: %s", refusal, extra={"kind": "refused", "batch": batch_size("x", x)})
                raise
        num_answers = int(prediction.returned.sum())
        self._counters.count_answered(prediction.latency, len(prediction.returned) - num_answers)
        log.info(
            "answered",
            extra={
                "kind": "answered",
                "batch": len(prediction.exact),
                "answers": num_answers,
                "seconds": prediction.latency,
            },
        )
        return prediction

    def _answer(self, x, submitted):
        code = self._code
        batch_size("x", x)
        if time.monotonic() - submitted >= self._time_limit:
            raise self._refuse_unsent()
        x = host_arrays(x)
        finite = find_finite(x)
        if not finite.all():
            _log_not_finite(finite)
        padded = pad_inputs(x, finite, code.num_data)
        shapes = _shapes(padded)
        is_cold = shapes not in self._warm
        if is_cold:
            log.warning("compiles for batches of %s: call warm_up beforehand", _describe(padded))
        predict = _keep_latest(self._codec.predict_errors)
        encode_began = time.monotonic()
        layout, sent = self._codec.encode(padded, finite)
        seconds_to_encode = time.monotonic() - encode_began
        try:
            responses = self._pool.run(
                sent,
                self._stop,
                time_limit=self._time_limit,
                began=submitted,
                enough=lambda returned: bool(np.all(code.recovered(returned))),
                error=(lambda *answered: predict(*answered)[layout.place]) if self._predicts else None,
                order=self._dispatch_order,
                again_after=self._again_after,
            )
        except NotEnoughAnswers as refusal:
            if not is_cold:
                raise
            message = (
                f"{refusal}; it was the first request of its shape, for which the server compiled for "
                f"{seconds_to_encode:.3g} s and then the workers did: call warm_up beforehand"
            )
            raise NotEnoughAnswers(message, refusal.responses) from refusal
        values, detection, returned = self._codec.decode(responses.values, responses.returned, layout.num_groups)
        self._warm.add(shapes)
        return Prediction(
            values=layout.restore(values),
            error=layout.restore_errors(predict(responses.values, returned)) if self._predicts else None,
            exact=layout.restore_members(np.asarray(code.exact(returned))),
            returned=_read_only(returned),
            latency=time.monotonic() - submitted,
            faults=responses.faults,
            detection=detection,
        )

    def _refuse_unsent(self):
        """Returns the refusal of a request of which nothing was sent to workers."""
        num_workers = self._code.num_workers
        nothing = Responses((), np.zeros(num_workers, bool), np.full(num_workers, np.inf), (), self._time_limit)
        message = (
            f"the request waited in the queue for its whole time limit of {self._time_limit:.3g} s; allow more in "
            "flight, or fewer to wait"
        )
        return NotEnoughAnswers(message, nothing)


def _log_not_finite(finite):
    numbers = np.flatnonzero(~finite)
    listed = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
    log.warning(
        "inputs %s of a batch of %d have a NaN or an infinite number: their results are NaN",
        listed,
        len(finite),
        extra={"kind": "not finite", "batch": len(finite)},
    )


def _keep_latest(predict):
    """Has a function of answers and a mask keep its latest result, for the same mask of one request."""
    latest = {}

    def predict_once(values, returned):
        mask = returned.tobytes()
        if mask not in latest:
            errors = predict(values, returned)
            latest.clear()
            latest[mask] = errors
        return latest[mask]

    return predict_once


def _read_only(array):
    array = np.array(array)
    array.flags.writeable = False
    return array


def _shapes(x):
    leaves, structure = jax.tree.flatten(x)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _describe(x):
    return ", ".join(f"{leaf.dtype} of shape {leaf.shape}" for leaf in jax.tree.leaves(x))
