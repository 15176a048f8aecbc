"""Goes on learning a surrogate from a model's answers as they come, such as those that pass through a server."""

import dataclasses
import logging
import threading
from typing import Any, final

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, PyTree

from .._batched_model import BatchedModel
from ..checks import batch_size, check_count, finite_inputs
from ..functions import call
from .calibration import calibrate_disagreement, calibrate_squared_error
from .predictors import Layout, LinearPredictor, ModulePredictor, Predictor, Surrogate
from .ridge import fit_ridge
from .training import BATCH, distillation_loss, fine_tune

log = logging.getLogger("jaxcode.surrogates")
log.addHandler(logging.NullHandler())

# A round begins when this share of what is kept is new: all rounds together take a bounded multiple of the last one.
_NEW_SHARE = 0.125
# How often each kept answer is used in a round, on average.
_EPOCHS = 8.0
# With fewer guesses, expected losses stay as they were; of more, the latest count.
_LEAST_TO_CALIBRATE, _MOST_TO_CALIBRATE = 200, 500
_MODEL_BATCH = 256


@final
class Learner:
    """Improves a surrogate by a model's answers, in the background.

    The latest answers are kept, at most `capacity` of them. When enough are new, a round of learning begins in a thread
    of its own: a network takes steps of gradient descent on the answers kept from before, or ridge regression is fitted
    to its errors on them. The result is the new surrogate if it guesses the new answers better. By the guesses for the
    new answers, from which neither has learned, expected losses are calibrated anew.

    A context manager: leaving it ends the thread.

    Args:
        prior: The surrogate to begin with.
        capacity: How many inputs and answers are kept.
        least_new: How many new answers begin a round, at least.
        seed: Seed of the order in which answers are used.

    Raises:
        ValueError: If prior is no surrogate, or a number is not whole or too small.

    References:
        Dawid, Statistical theory: the prequential approach, Journal of the Royal Statistical Society A 147 (1984), for
        testing on new data before learning from them.

    >>> import jax.numpy as jnp
    >>> import jaxcode as jc
    >>> x = np.random.default_rng(0).uniform(0, 3, (500, 1)).astype(np.float32)
    >>> prior = jc.surrogate(jnp.sin, x[:30], cost=1000.0, progress=False)
    >>> with Learner(prior, least_new=100) as learner:
    ...     for start in range(0, 500, 50):
    ...         learner.observe(x[start : start + 50], jnp.sin(x[start : start + 50]))
    ...         is_done = learner.wait()
    >>> learner.counters()["observed"], learner.counters()["rounds"]
    (500, 5)
    """

    def __init__(self, prior: Surrogate, *, capacity: int = 4096, least_new: int = 256, seed: int = 0):
        if not isinstance(prior, Surrogate):
            raise ValueError(f"prior is {prior!r}; expected a surrogate, such as jaxcode.surrogate(f, inputs)")
        self._least_new = check_count("least_new", least_new, least=2)
        self._memory = _Memory(check_count("capacity", capacity, least=2 * least_new))
        self._surrogate, self._rng = prior, np.random.default_rng(seed)
        self._counters: dict[str, int | float] = {"observed": 0, "rounds": 0, "improved": 0, "squared_error": np.nan}
        self._recent: _Guesses | None = None
        self._changed = threading.Condition()
        self._is_learning = self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def surrogate(self) -> Surrogate:
        """The surrogate as it is now; it has the structure of the first, so that nothing compiles again."""
        return self._surrogate

    def observe(self, x: PyTree[ArrayLike], answers: PyTree[ArrayLike]) -> None:
        """Keeps inputs and the model's answers to them, and begins a round if enough are new; does not wait for it.

        Those with a NaN or an infinite number are not kept.

        Args:
            x: Leaves (B, ...), which are copied.
            answers: The model's own answers, leaves (B, ...).

        Raises:
            ValueError: If leading axes differ or are 0, or answers are not like the surrogate's guesses.
        """
        size = batch_size("x", x)
        if batch_size("answers", answers) != size:
            raise ValueError(
                f"answers has {batch_size('answers', answers)} rows; expected one for each of {size} inputs"
            )
        layout = Layout.of(jax.tree.map(np.asarray, answers))
        if (layout.structure, layout.shapes) != (self._surrogate.layout.structure, self._surrogate.layout.shapes):
            raise ValueError(f"answers have shapes {layout.shapes}; expected {self._surrogate.layout.shapes}")
        rows = np.concatenate(
            [np.asarray(leaf).reshape(size, -1).astype(np.float32) for leaf in jax.tree.leaves(answers)], axis=1
        )
        x = jax.tree.map(np.asarray, x)
        finite = finite_inputs((x, rows), size)
        with self._changed:
            if self._is_closed or not finite.any():
                return
            self._memory.add(jax.tree.map(lambda leaf: leaf[finite], (x, rows)))
            self._counters["observed"] += int(finite.sum())
            if self._has_enough():
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="jaxcode learner", daemon=True)
                    self._thread.start()
                self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for the round that has begun, or would begin with what was observed; returns False if time is up."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._is_closed or not (self._is_learning or self._has_enough()), seconds
            )

    def counters(self) -> dict[str, int | float]:
        """Returns the number of events of each kind.

        Answers "observed"; "rounds" of learning; those by which guesses "improved"; and "squared_error", the mean
        squared error of guesses for the answers that were new in the latest round, over the answers' variance; NaN
        before the first.
        """
        with self._changed:
            return dict(self._counters)

    def close(self) -> None:
        """Ends the thread after the round that it is in; nothing is learned any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _has_enough(self):
        return self._memory.num_new >= max(self._least_new, _NEW_SHARE * self._memory.size)

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._has_enough())
                if self._is_closed:
                    return
                old, new = self._memory.take()
                self._is_learning = True
            try:
                surrogate, recent, error = self._learn(old, new)
                with self._changed:
                    self._counters["squared_error"] = error
                    self._counters["improved"] += surrogate.predictor is not self._surrogate.predictor
                    self._surrogate, self._recent = surrogate, recent
            except Exception:
                # The surrogate stays as it is; a server goes on.
                log.exception("a round of learning failed")
            with self._changed:
                self._counters["rounds"] += 1
                self._is_learning = False
                self._changed.notify_all()

    def _learn(self, old, new):
        """Does one round.

        Args:
            old: Inputs and rows of answers that were kept from before; None if there are none.
            new: Those that are new.

        Returns:
            The new surrogate; the latest guesses; and the error of those for the new answers.
        """
        surrogate, (x, rows) = self._surrogate, new
        is_class_scores = surrogate.layout.is_class_scores
        predictors = [surrogate.predictor]
        if old is not None and len(old[1]) >= BATCH:
            old_x, old_rows = old
            predictors.append(self._improve(surrogate.predictor, old_x, old_rows, is_class_scores))
        scale = np.float32(rows.std() or 1.0)
        guesses = [_guess(predictor, x) for predictor in predictors]
        losses = [float(distillation_loss(values, rows, scale, is_class_scores)) for values, _ in guesses]
        best = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
        recent = _Guesses(guesses[best][0], rows, guesses[best][1])
        error = float(np.mean((recent.guesses - rows) ** 2)) / (float(rows.var(axis=0).mean()) or 1.0)
        if self._recent is not None:
            recent = self._recent.extend(recent)
        surrogate = dataclasses.replace(surrogate, predictor=predictors[best])
        if len(recent.scores) >= _LEAST_TO_CALIBRATE:
            squares = np.mean((recent.guesses - recent.answers) ** 2, axis=1)
            surrogate = dataclasses.replace(
                surrogate,
                class_risk=calibrate_disagreement(recent.guesses, recent.answers) if is_class_scores else None,
                value_risk=calibrate_squared_error(recent.scores, squares),
            )
        return surrogate, recent, error

    def _improve(self, predictor, x, rows, is_class_scores) -> Predictor:
        """Fits the predictor to answers."""
        if isinstance(predictor, ModulePredictor):
            num_steps = max(1, round(_EPOCHS * len(rows) / BATCH))
            seed = int(self._rng.integers(2**31))
            params = fine_tune(
                predictor.fn, predictor.params, x, rows, num_steps=num_steps, is_class_scores=is_class_scores, seed=seed
            )
            return dataclasses.replace(predictor, params=params)
        assert isinstance(predictor, LinearPredictor)
        features = BatchedModel(call, predictor.features, min(_MODEL_BATCH, len(rows)))(x)
        fit = fit_ridge(features, rows - _guess(predictor, x)[0])
        weights, offset = np.array(predictor.weights), np.array(predictor.offset)
        weights[:, :-1] += fit.weights
        offset[:-1] += fit.offset
        return dataclasses.replace(predictor, weights=weights, offset=offset)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class _Guesses:
    """Holds guesses of answers that had not been learned from.

    Attributes:
        guesses: As rows, (n, numbers).
        answers: As rows, (n, numbers).
        scores: Of the guesses, (n,).
    """

    guesses: Float[np.ndarray, "rows numbers"]
    answers: Float[np.ndarray, "rows numbers"]
    scores: Float[np.ndarray, "rows"]

    def extend(self, others: "_Guesses") -> "_Guesses":
        """Appends others, and drops the earliest, which tell of earlier surrogates."""
        count = max(_MOST_TO_CALIBRATE, len(others.scores))
        names = [field.name for field in dataclasses.fields(self)]
        return _Guesses(*(np.concatenate([getattr(self, n), getattr(others, n)])[-count:] for n in names))


@final
class _Memory:
    """Keeps the latest inputs and answers.

    Args:
        capacity: How many.

    Attributes:
        size: How many there are.
        num_new: How many of them were added since the latest call of `take`.
    """

    def __init__(self, capacity: int):
        self.capacity, self.size, self.num_new = capacity, 0, 0
        self._rows: PyTree[Any] = None
        self._next = 0

    def add(self, rows: PyTree[np.ndarray]) -> None:
        """Adds rows, leaves (n, ...)."""
        rows = jax.tree.map(lambda leaf: leaf[-self.capacity :], rows)
        if self._rows is None:
            self._rows = jax.tree.map(lambda leaf: np.empty((self.capacity, *leaf.shape[1:]), leaf.dtype), rows)
        count = len(jax.tree.leaves(rows)[0])
        places = (self._next + np.arange(count)) % self.capacity

        def store(kept, leaf):
            kept[places] = leaf

        jax.tree.map(store, self._rows, rows)
        self._next = (self._next + count) % self.capacity
        self.size = min(self.size + count, self.capacity)
        self.num_new = min(self.num_new + count, self.capacity)

    def take(self) -> tuple[PyTree[np.ndarray] | None, PyTree[np.ndarray]]:
        """Returns copies of the rows from before the latest call, None if there are none, and of the new ones."""
        latest_first = (self._next - 1 - np.arange(self.size)) % self.capacity
        old, new = latest_first[self.num_new :], latest_first[: self.num_new]
        self.num_new = 0
        return self._copy(old) if len(old) else None, self._copy(new)

    def _copy(self, places: Int[np.ndarray, "chosen"]) -> PyTree[np.ndarray]:
        return jax.tree.map(lambda leaf: leaf[places], self._rows)


def _guess(predictor: Predictor, x: PyTree[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns guesses as rows and their scores."""
    return BatchedModel(call, predictor, _MODEL_BATCH)(x)
