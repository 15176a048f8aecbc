"""Runs many rounds: progress, records, checkpoints and the detection of divergence."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from ..checks import check_count
from ._checkpoints import Checkpoints

# A run has diverged if its objective is more than so many times as large as that of the first parameters and of zeros.
_MAX_GROWTH = 1e3


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """Holds what was recorded during a run, one entry for each record.

    Attributes:
        rounds: The number of rounds so far.
        epochs: The number of samples' gradients computed so far, in units of n, if no machine missed a round.
        floats: The number of floats that each machine has sent so far, if it missed none.
        seconds: Seconds since the run began.
        values: What `evaluate` returned, leaves (entries, ...); the objective if not given.
    """

    rounds: np.ndarray
    epochs: np.ndarray
    floats: np.ndarray
    seconds: np.ndarray
    values: PyTree[np.ndarray]


class DivergenceError(ArithmeticError):
    """Reports that parameters or the objective are not finite, or that the objective is far above its first value.

    Attributes:
        history: The records of the run, that of the last parameters included; not set where a single round diverges.
    """

    history: History


def run(
    method,
    state,
    num_rounds,
    advance,
    *,
    every,
    evaluate,
    callbacks,
    checkpoint,
    progress,
    template=lambda state: state,
    collect=lambda state: state,
    distribute=lambda state: state,
):
    """Computes many rounds, as `AbstractMethod.run`.

    Args:
        method: The method.
        state: The state after the last round.
        num_rounds: How many more rounds.
        advance: From a state and a number of rounds to the state after them.
        every: As for `AbstractMethod.run`, as are evaluate, callbacks, checkpoint and progress.
        evaluate: See there.
        callbacks: See there.
        checkpoint: See there.
        progress: See there.
        template: From a state to one with the shapes of all that is stored.
        collect: From a state to one with all that is stored, or None if it is not available.
        distribute: From a restored state to one that advance takes.

    Returns:
        The last state, and what was recorded.
    """
    num_rounds, every = check_count("num_rounds", num_rounds, least=0), check_count("every", every)
    first_round = _round_number(state)
    recorder = _Recorder(method, state, evaluate)
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if checkpoint is not None:
            checkpoints = stack.enter_context(Checkpoints(checkpoint, method, state))
            restored = checkpoints.restore(template(state))
            state = state if restored is None else distribute(restored)
        bar = stack.enter_context(tqdm(total=num_rounds, desc="rounds", disable=not progress, file=sys.stderr))
        num_done = _round_number(state) - first_round
        bar.update(num_done)
        recorder.record(state, is_last=num_done >= num_rounds)
        while num_done < num_rounds:
            count = min(every, num_rounds - num_done)
            try:
                state = advance(state, count)
            except DivergenceError as error:
                error.history = recorder.history()
                raise
            num_done = _round_number(state) - first_round
            record = recorder.record(state, is_last=num_done >= num_rounds)
            stored = None if checkpoints is None else collect(state)
            if checkpoints is not None and stored is not None:
                checkpoints.save(stored)
            bar.update(count)
            bar.set_postfix(_format_values(record["values"]))
            # All callbacks are called, whatever the others return.
            if any([bool(callback(state, record)) for callback in callbacks]):
                break
    return state, recorder.history()


class _Recorder:
    """Records states of a run, and compares their objective with that of the start."""

    def __init__(self, method, state, evaluate):
        self._method, self._first_state, self._evaluate = method, state, evaluate
        self._start_time, self._records = time.monotonic(), []
        zeros = jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.params))
        values = [abs(self._objective(params)) for params in (state.params, zeros)]
        # Where the fit is perfect, rounding errors are no divergence.
        self._reference = max([1e-6, *(value for value in values if np.isfinite(value))])

    def record(self, state, *, is_last):
        """Adds a record of a state and returns it; raises DivergenceError if the state has diverged."""
        objective = self._objective(state.params) if self._evaluate is None or is_last else None
        values = objective if self._evaluate is None else jax.device_get(self._evaluate(state.params))
        method, rounds = self._method, _round_number(state)
        record = {
            "rounds": rounds,
            "epochs": rounds * method.samples_per_round() / state.data.num_samples,
            "floats": rounds * method.floats_per_round(state),
            "values": jax.tree.map(np.asarray, values),
            "seconds": time.monotonic() - self._start_time,
        }
        self._records.append(record)
        reason = self._divergence(state.params, objective)
        if reason is not None:
            error = DivergenceError(
                f"after {rounds} rounds {reason}; take shorter steps than step_size = "
                f"{float(jax.device_get(state.step_size)):.3g}, or a shorter period"
            )
            error.history = self.history()
            raise error
        return record

    def history(self):
        """Returns all records so far."""
        names = "rounds", "epochs", "floats", "seconds"
        columns = {name: np.array([record[name] for record in self._records]) for name in names}
        values = jax.tree.map(lambda *leaves: np.stack(leaves), *[record["values"] for record in self._records])
        return History(**columns, values=values)

    def _objective(self, params):
        return jax.device_get(self._method.objective(params, self._first_state))

    def _divergence(self, params, value):
        """Describes why parameters or their objective have diverged; returns None if they have not."""
        if not jax.device_get(_all_finite(params)):
            return "params are not finite"
        if value is None:
            return None
        if not np.isfinite(value):
            return f"the objective is {value}"
        if value > _MAX_GROWTH * self._reference:
            return f"the objective is {value:.3g}, and not more than {self._reference:.3g} at the start"
        return None


@jax.jit
def _all_finite(params):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def _round_number(state):
    return int(jax.device_get(state.round))


def _format_values(values):
    items = values.items() if isinstance(values, Mapping) else [("objective", values)]
    return {name: f"{float(value):.6g}" for name, value in items if np.ndim(value) == 0}
