"""Serves predictions: encodes a batch, has workers compute, waits until its stop policy is met, decodes the answers."""

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
from ..allocation import find_planner
from ..checks import batch_size, check_count, is_static, list_indices
from ..codes import AbstractCode
from ..ordering import Ordering
from ..outputs import OutputSpace, as_returned
from ..pipeline import StaticCode
from ..pools import AbstractPool, Fault, NotEnoughAnswers, Responses
from ..robust import Defence, Detection
from ..stop import AbstractStop, answers
from ..stragglers import AbstractStragglers
from ..surrogates import Learner, Surrogate
from ..surrogates.calibration import SQUARED_ERROR
from ._assignment import assignment_order
from ._codec import Codec
from ._counters import Counters
from ._detector import Detector
from ._layout import fetch_arrays, find_finite, pad_inputs
from ._queue import BoundedQueue, QueueFull

log = logging.getLogger("jaxcode.serving")
log.addHandler(logging.NullHandler())


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """Holds the results of a request and what is known of their quality, in read-only NumPy arrays.

    Attributes:
        values: Results in the order of the batch, leaves (B, ...). NaN (the lowest number of an integer dtype) for an
            input that has a NaN or an infinite number, or that cannot be recovered without the workers that the defence
            flags.
        error: Predicted error of each input, shape (B,): root mean square over its outputs of the standard errors of
            `decode_with_error`, in the space in which answers are decoded; infinite where none can be predicted. None
            if the server predicts no errors.
        exact: Which results are f's own, as a worker computed the input itself and its answer is the result, bool (B,).
            Not those of workers whose answers the defence calls unresolved.
        returned: Coded inputs whose answers the results are decoded from, bool, shape (N,).
        latency: Seconds from the submission of the request to this prediction, time in the queue included.
        faults: The failures of workers during the request.
        detection: Which workers the defence trusts and flags; None without a defence.
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
    r"""Serves predictions of batches, decoded from the answers of whichever workers of a pool reply.

    A batch is ordered, split into groups of K and encoded; idle workers compute f on the N coded inputs of all groups,
    and when the stop policy is met the results are decoded from the answers that came. Workers that are slow,
    dead, stuck or faulty make a prediction less exact, not late.

    With a prior, `jaxcode.surrogate(f, inputs)`, a result that cannot be recovered is the prior's guess, approximate.
    The guesses are computed while workers compute; if stragglers are given too, workers first get one copy of each
    input, and then, when the guesses are there, copies of those whose guesses are worst.

    The number of groups is rounded up to a power of two, and for each such number, as for each shape of inputs,
    programs are compiled on this host and on every worker. `warm_up` does that beforehand; a request that
    compiles is logged, and its time limit includes compilation.

    An input with a NaN or an infinite number is not encoded, as it would spoil its whole group: its own result is NaN,
    and the log names it.

    All threads compute in the precision (x64 on or off) in which the server was made.

    Args:
        code: The code. Any idle worker computes any of its N coded inputs; usually there are N workers.
        pool: The workers that compute f. The server does not close it.
        stop: When to stop waiting, such as `stop.answers(25) | stop.deadline(0.2)`. The policy is asked once the
            answers are enough to decode every input, and waiting also ends when no running worker could still answer.
            Its seconds, too, count from the submission of a request.
        time_limit: Seconds after the submission of a request at which its results are decoded from the answers that
            came, or it is refused if these are not enough.
        order: As for `jaxcode.coded`.
        output: As for `jaxcode.coded`.
        defence: As for `jaxcode.coded`. Answers that are not finite never count as returned. The evidence of a
            `jaxcode.robust.SequentialTest` is kept by worker of the pool, and those that it flags are logged.
        prior: As for `jaxcode.coded`. Any answer is then enough to decode: the policy says how many to wait for, or
            which predicted error to reach. A `jaxcode.surrogates.Learner` goes on learning from the answers that are
            f's own; the server does not close it.
        stragglers: As for `jaxcode.coded`; a batch of several groups keeps its order.
        loss: As for `jaxcode.coded`.
        again_after: Seconds after which a coded input without an answer is assigned to a second worker too (hedging),
            if one is idle; never if not given. With `ReplicationCode` those come first whose loss would
            cost most: inputs without any answer, by the prior's risk.
        predict_error: Whether predictions have their predicted error, which costs some milliseconds. If not given, they
            do where the code predicts errors.
        max_in_flight: How many requests of `submit` and `predict_async` are processed concurrently.
        max_queued: How many more of them may wait; any further one is rejected with `QueueFull`.

    Raises:
        ValueError: If stop can never be reached, a number is out of range, code is no code or not a static one,
            predict_error is True and the code predicts no errors, or prior, stragglers or loss are not what
            `jaxcode.coded` takes.

    >>> import jax.numpy as jnp
    >>> from jaxcode import SplineCode, stop
    >>> from jaxcode.pools import ThreadPool
    >>> code = SplineCode.chebyshev(num_data=4, num_workers=12)
    >>> x = np.linspace(0.0, 1.0, 4, dtype=np.float32)
    >>> with ThreadPool(jnp.sin, num_workers=12) as pool:
    ...     server = CodedServer(code, pool, stop.answers(9))
    ...     prediction = server(x)
    >>> int(prediction.returned.sum()) >= 9, bool(np.max(np.abs(prediction.values - np.sin(x))) < 0.02)
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
        prior: Surrogate | Learner | None = None,
        stragglers: AbstractStragglers | None = None,
        loss: str = SQUARED_ERROR,
        again_after: float | None = None,
        predict_error: bool | None = None,
        max_in_flight: int = 8,
        max_queued: int = 64,
    ):
        if not isinstance(code, AbstractCode):
            raise ValueError(
                f"code is {code!r}; expected a code such as SplineCode.chebyshev(num_data=20, num_workers=30)"
            )
        if code.needs_plan and not code.inputs_first:
            raise ValueError(
                f"code is a {type(code).__name__}, whose first workers wait for a plan; expected a code that needs "
                "none, such as SplineCode.systematic(num_data=20, num_workers=30), or one whose inputs_first is True"
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
        self._predicts_error = code.predicts_error if predict_error is None else predict_error
        stop.check(code.num_workers, self._predicts_error)
        for name, seconds in (("time_limit", time_limit), ("again_after", again_after)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} is {seconds!r}; expected seconds, above zero")
        self._code, self._pool, self._stop, self._time_limit = code, pool, stop, float(time_limit)
        self._again_after, self._assignment_order = again_after, assignment_order(code)
        self._x64 = x64_is_on()
        self._learner = prior if isinstance(prior, Learner) else None
        surrogate = prior.surrogate if isinstance(prior, Learner) else prior
        self._planner = find_planner(code, surrogate, stragglers, loss)
        self._codec = Codec(StaticCode(code), order, output, defence, self._planner, self._x64)
        self._queue = BoundedQueue(
            check_count("max_in_flight", max_in_flight), check_count("max_queued", max_queued, least=0)
        )
        self._counters = Counters()
        self._detector = Detector(self._codec, pool.num_workers)
        # Structures, shapes and dtypes of padded batches for which everything is compiled.
        self._compiled_shapes: set[Any] = set()

    def __call__(self, x: PyTree[Any]) -> Prediction:
        """Answers a batch, in the thread of the caller and without waiting in the queue.

        Args:
            x: The batch, leaves (B, ...).

        Returns:
            The prediction.

        Raises:
            NotEnoughAnswers: If the answers that came within the time limit are not enough to decode, or no worker is
                left that could compute the missing ones.
            PoolClosed: If the pool is closed.
            ValueError: As a call of `jaxcode.coded`'s result does; if no input is finite; or if x64 is on now and was
                off when the server was made.
        """
        self._check_precision()
        return self._predict(x, time.monotonic())

    def submit(self, x: PyTree[Any]) -> Future[Prediction]:
        """Queues a batch, to be answered in the background, at most `max_in_flight` of them concurrently.

        Cancelling the future of a request that waits makes room for another.

        Args:
            x: As for a call.

        Returns:
            A future of the prediction, which raises what a call does.

        Raises:
            QueueFull: If `max_queued` requests wait already.
            RuntimeError: If the server is closed.
            ValueError: If x64 is on now and was off when the server was made.
        """
        self._check_precision()
        try:
            return self._queue.submit(functools.partial(self._predict, x, time.monotonic()))
        except QueueFull as problem:
            self._counters.count_rejected()
            log.warning("rejected: %s", problem, extra={"kind": "rejected"})
            raise

    async def predict_async(self, x: PyTree[Any]) -> Prediction:
        """Answers a batch without blocking the event loop; arguments, result and errors as for a call and `submit`."""
        return await asyncio.wrap_future(self.submit(x))

    def warm_up(self, x: PyTree[Any]) -> None:
        """Compiles everything, on this host and on all workers, for batches like x; workers started later do so too.

        Batches of other sizes need the same programs if their number of groups is rounded up to the same power of two.

        Args:
            x: Leaves (B, ...), arrays or `jax.ShapeDtypeStruct`, of which only shapes and dtypes are read.

        Raises:
            RuntimeError: If no worker can compute such a batch.
            PoolClosed: If the pool is closed.
            ValueError: As for a call.
        """
        self._check_precision()
        with jax.enable_x64(self._x64):
            zeros = fetch_arrays(jax.tree.map(lambda leaf: np.zeros(np.shape(leaf), leaf.dtype), x))
            all_finite = np.ones(batch_size("x", x), bool)
            padded = pad_inputs(zeros, all_finite, self._code.num_data, rounds=self._codec.rounds)
            batch = self._codec.encode(padded, all_finite)
            self._pool.warm_up(jax.tree.map(lambda leaf: leaf[0], batch.coded_inputs))
            # No answer is needed: those to zeros may all be invalid, such as NaN.
            values = self._run(batch, answers(1), can_decode=lambda returned: True).values
            num_padded = jax.tree.leaves(batch.coded_inputs)[0].shape[1]
            # Decoding may be another program where every worker answered. A defence examines all groups, or half.
            for returned in np.arange(self._code.num_workers) >= np.arange(2)[:, None]:
                for num_occupied in {num_padded, -(-num_padded // 2)}:
                    batch.layout = dataclasses.replace(batch.layout, num_occupied=num_occupied)
                    self._detector.compile(values, batch)
                self._codec.decode(values, returned, batch)
                self._codec.find_exact(returned, batch)
                if self._predicts_error:
                    self._codec.predict_errors(values, returned, batch)
            self._compiled_shapes.add(_shape_key(padded))

    def counters(self) -> dict[str, Any]:
        """Returns the number of events of each kind since the server was made.

        Requests that were "answered", "refused" as too few answers came (`NotEnoughAnswers`) and "rejected" as the
        queue was full (`QueueFull`); "stragglers", the coded inputs that answered requests did not wait for; "latency",
        a cumulative histogram: the number of predictions that took at most as many seconds as each key; "latency_sum",
        their seconds in total; "workers", the counters of the pool, since it was made; and "prior", those of the
        learner, if there is one.
        """
        counters = {**self._counters.snapshot(), "workers": self._pool.counters()}
        return counters if self._learner is None else {**counters, "prior": self._learner.counters()}

    def register_metrics(self, registry: Any = None) -> None:
        """Exports the counters to Prometheus, as metrics named jaxcode_..., which are read at each collection.

        Args:
            registry: A `prometheus_client` registry; its default one if not given.

        Raises:
            ImportError: If prometheus-client is not installed.
        """
        from .prometheus import register

        register(self, self._pool, registry)

    def close(self) -> None:
        """Waits for the requests that were submitted, and accepts no more. The pool stays open."""
        self._queue.close()

    def _check_precision(self):
        if x64_is_on() and not self._x64:
            raise ValueError(
                "x64 is on here, but was off where the server was made, which computes in single precision; make the "
                "server and its pool with x64 on, as with jax.enable_x64(True)"
            )

    def _predict(self, x, submit_time):
        """Answers a batch, logs the outcome and counts it; `submit_time` is a reading of `time.monotonic`."""
        with jax.enable_x64(self._x64):
            try:
                prediction = self._answer(x, submit_time)
            except NotEnoughAnswers as shortage:
                self._counters.count_refused()
                log.warning("refused: %s", shortage, extra={"kind": "refused", "batch": batch_size("x", x)})
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

    def _answer(self, x, submit_time):
        batch_size("x", x)
        if time.monotonic() - submit_time >= self._time_limit:
            raise self._queue_timeout()
        x = fetch_arrays(x)
        finite = find_finite(x)
        if not finite.all():
            _log_not_finite(finite)
        padded = pad_inputs(x, finite, self._code.num_data, rounds=self._codec.rounds)
        shape_key = _shape_key(padded)
        is_cold = shape_key not in self._compiled_shapes
        if is_cold:
            log.warning("compiles for batches of %s: call warm_up beforehand", _describe(padded))
        encode_start = time.monotonic()
        batch = self._codec.encode(padded, finite)
        layout = batch.layout
        seconds_to_encode = time.monotonic() - encode_start
        predict_errors = _keep_latest(functools.partial(self._codec.predict_errors, batch=batch))
        try:
            responses = self._run(
                batch,
                self._stop,
                can_decode=self._can_decode,
                start_time=submit_time,
                error=(lambda values, mask: predict_errors(values, mask)[layout.place])
                if self._predicts_error
                else None,
                again_after=self._again_after,
            )
        except NotEnoughAnswers as shortage:
            if not is_cold:
                raise
            message = (
                f"{shortage}; it was the first request of its shape, for which the server compiled for "
                f"{seconds_to_encode:.3g} s and then the workers did: call warm_up beforehand"
            )
            raise NotEnoughAnswers(message, shortage.responses) from shortage
        examined = self._detector.examine(responses, batch)
        values = self._codec.decode(responses.values, examined.trusted, batch)
        self._compiled_shapes.add(shape_key)
        # What is known of the results where answers may be wrong is what is known without these.
        certain = examined.certain
        prediction = Prediction(
            values=layout.restore(values),
            error=layout.restore_errors(predict_errors(responses.values, certain)) if self._predicts_error else None,
            exact=layout.restore_mask(self._codec.find_exact(certain, batch)),
            returned=_freeze(examined.trusted),
            latency=time.monotonic() - submit_time,
            faults=responses.faults,
            detection=examined.detection,
        )
        if self._learner is not None and prediction.exact.any():
            own = jax.tree.map(lambda leaf: leaf[prediction.exact], (x, prediction.values))
            self._learner.observe(*own)
        return prediction

    def _run(self, batch, stop, **options):
        """Has workers compute a batch; those of its coded inputs that need a plan follow when that is made."""
        order = None if self._codec.num_planned else self._assignment_order
        planner = self._planner
        if planner is not None and self._learner is not None:
            planner = dataclasses.replace(planner, prior=self._learner.surrogate)
        more = functools.partial(self._codec.plan, batch, planner) if self._codec.needs_plans else None
        return self._pool.run(
            batch.coded_inputs,
            stop,
            time_limit=self._time_limit,
            order=order,
            num_more=self._codec.num_planned,
            more=more,
            worth=functools.partial(self._codec.worth, batch=batch) if self._codec.has_worth else None,
            **options,
        )

    def _can_decode(self, returned):
        return bool(np.all(self._code.recovered(returned)) if self._planner is None else returned.any())

    def _queue_timeout(self):
        """Returns the exception for a request that is refused as it used up its time limit in the queue."""
        num_workers = self._code.num_workers
        no_responses = Responses(
            (),
            np.zeros(num_workers, bool),
            np.full(num_workers, np.inf),
            np.full(num_workers, -1),
            (),
            self._time_limit,
        )
        message = (
            f"the request waited in the queue for its whole time limit of {self._time_limit:.3g} s; allow more in "
            "flight, or fewer to wait"
        )
        return NotEnoughAnswers(message, no_responses)


def _log_not_finite(finite):
    log.warning(
        "inputs %s of a batch of %d have a NaN or an infinite number: their results are NaN",
        list_indices(~finite),
        len(finite),
        extra={"kind": "not finite", "batch": len(finite)},
    )


def _keep_latest(predict):
    """Wraps a function of answers and a mask, for one request, so that it stores its result for the latest mask."""
    errors_by_mask = {}

    def predict_latest(values, returned):
        mask = returned.tobytes()
        if mask not in errors_by_mask:
            errors = predict(values, returned)
            errors_by_mask.clear()
            errors_by_mask[mask] = errors
        return errors_by_mask[mask]

    return predict_latest


def _freeze(array):
    array = np.array(array)
    array.flags.writeable = False
    return array


def _shape_key(x):
    leaves, structure = jax.tree.flatten(x)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _describe(x):
    return ", ".join(f"{leaf.dtype} of shape {leaf.shape}" for leaf in jax.tree.leaves(x))
