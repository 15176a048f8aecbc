"""Many rounds: progress, records, checkpoints."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from .._checks import check_count


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """What was recorded along the way, one entry each.

    Attributes:
        rounds: How many rounds there had been.
        epochs: How many gradients of samples had been computed, in units of n.
        floats: How many numbers each machine had sent.
        seconds: Since the run began.
        values: What `evaluate` said, leaves (entries, ...); the objective if not given.
    """

    rounds: np.ndarray
    epochs: np.ndarray
    floats: np.ndarray
    seconds: np.ndarray
    values: PyTree[np.ndarray]


def run(method, state, key, num_rounds, every, stragglers, evaluate, callbacks, checkpoint, progress):
    """As `AbstractMethod.run`."""
    num_rounds, every = check_count("num_rounds", num_rounds, least=0), check_count("every", every)
    evaluate = evaluate or (lambda params: method.objective(params, state))
    began, first = time.monotonic(), int(state.round)
    with (
        _checkpoints(checkpoint) as (restore, save),
        tqdm(total=num_rounds, desc="rounds", disable=not progress, file=sys.stderr) as bar,
    ):
        state = restore(state)
        bar.update(int(state.round) - first)
        records = [_record(method, state, evaluate, began)]
        while (done := int(state.round) - first) < num_rounds:
            count = min(every, num_rounds - done)
            state = _rounds(method, state, key, count, stragglers)
            record = _record(method, state, evaluate, began)
            records.append(record)
            save(state)
            bar.update(count)
            bar.set_postfix(_shown(record["values"]))
            # All are called, whatever the others say.
            if any([bool(callback(state, record)) for callback in callbacks]):
                break
    columns = {
        name: np.array([record[name] for record in records]) for name in ("rounds", "epochs", "floats", "seconds")
    }
    values = jax.tree.map(lambda *leaves: np.stack(leaves), *[record["values"] for record in records])
    return state, History(**columns, values=values)


@jax.jit
def _rounds(method, state, key, count, stragglers):
    def go(_, state):
        if stragglers is None:
            return method.round(state, key)
        # Machines draw their samples with the numbers before.
        of_round = jax.random.fold_in(jax.random.fold_in(key, state.round), method.num_machines)
        return method.round(state, key, stragglers.sample(of_round, method.num_machines))

    return jax.lax.fori_loop(0, count, go, state)


def _record(method, state, evaluate, began):
    rounds = int(state.round)
    return {
        "rounds": rounds,
        "epochs": rounds * method.samples_per_round() / state.data.num_samples,
        "floats": rounds * method.floats_per_round(state),
        "values": jax.tree.map(np.asarray, evaluate(state.params)),
        "seconds": time.monotonic() - began,
    }


def _shown(values):
    named = values.items() if isinstance(values, Mapping) else [("objective", values)]
    return {name: f"{float(value):.6g}" for name, value in named if np.ndim(value) == 0}


@contextlib.contextmanager
def _checkpoints(folder):
    """How the newest checkpoint is taken up, if there is one, and how one more is left."""
    if folder is None:
        yield (lambda state: state), (lambda state: None)
        return
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(Path(folder).absolute(), options=options) as manager:

        def restore(state):
            if manager.latest_step() is None:
                return state
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _moving(state))
            found = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
            return dataclasses.replace(state, **found)

        yield restore, lambda state: manager.save(int(state.round), args=ocp.args.StandardSave(_moving(state)))


def _moving(state):
    """All but the samples."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "data"}
