"""Many rounds: progress, records, checkpoints."""

import contextlib
import dataclasses
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from ..checks import check_count


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """What was recorded along the way, one entry each.

    Attributes:
        rounds: How many rounds there had been.
        epochs: How many gradients of samples had been computed, in units of n, if no machine missed a round.
        floats: How many numbers each machine had sent, if it missed none.
        seconds: Since the run began.
        values: What `evaluate` said, leaves (entries, ...); the objective if not given.
    """

    rounds: np.ndarray
    epochs: np.ndarray
    floats: np.ndarray
    seconds: np.ndarray
    values: PyTree[np.ndarray]


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
    gather=lambda state: state,
    place=lambda state: state,
):
    """As `AbstractMethod.run`.

    Args:
        method: Whose rounds they are.
        state: Where to begin.
        num_rounds: How many more.
        advance: From a state and how many rounds, to the state after them.
        every: As there, as are evaluate, callbacks, checkpoint and progress.
        evaluate: See there.
        callbacks: See there.
        checkpoint: See there.
        progress: See there.
        gather: From a state to one that holds all there is to store.
        place: The other way round.
    """
    num_rounds, every = check_count("num_rounds", num_rounds, least=0), check_count("every", every)
    evaluate = evaluate or (lambda params: method.objective(params, state))
    began, first = time.monotonic(), int(state.round)
    with (
        _checkpoints(checkpoint, method, state.data.samples) as (restore, save),
        tqdm(total=num_rounds, desc="rounds", disable=not progress, file=sys.stderr) as bar,
    ):
        state = place(restore(gather(state)))
        bar.update(int(state.round) - first)
        records = [_record(method, state, evaluate, began)]
        while (done := int(state.round) - first) < num_rounds:
            count = min(every, num_rounds - done)
            state = advance(state, count)
            record = _record(method, state, evaluate, began)
            records.append(record)
            save(gather(state))
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
def _checkpoints(folder, method, samples):
    """How the newest checkpoint is taken up, if there is one, and how one more is left."""
    if folder is None:
        yield (lambda state: state), (lambda state: None)
        return
    import orbax.checkpoint as ocp

    problem = _problem(method, samples)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(Path(folder).absolute(), options=options, item_handlers=handler) as manager:

        def restore(state):
            newest = manager.latest_step()
            if newest is None:
                return state
            leaves, structure = jax.tree.flatten(state.moving())
            like = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                for name, leaf in (_named(leaves) | problem).items()
            }
            there = manager.item_metadata(newest)
            sizes = {name: tuple(entry.shape) for name, entry in dict(there).items()}
            if sizes != {name: leaf.shape for name, leaf in like.items()}:
                raise ValueError(f"checkpoint {folder} is of another method or other samples: its arrays are {sizes}")
            found = manager.restore(newest, args=ocp.args.StandardRestore(like))
            if not np.array_equal(found["settings"], problem["settings"]):
                raise ValueError(f"checkpoint {folder} is of another method or other settings than {method!r}")
            if not np.array_equal(found["samples"], problem["samples"]):
                raise ValueError(f"checkpoint {folder} is of other samples, or of the same in another order")
            leaves = [found.get(str(i), leaf) for i, leaf in enumerate(leaves)]
            return dataclasses.replace(state, **jax.tree.unflatten(structure, leaves))

        def save(state):
            arrays = _named(jax.tree.leaves(state.moving())) | problem
            manager.save(int(state.round), args=ocp.args.StandardSave(arrays))

        yield restore, save


def _named(leaves):
    """Those that are not empty, which cannot be stored."""
    return {str(i): jnp.asarray(leaf) for i, leaf in enumerate(leaves) if np.size(leaf)}


def _problem(method, samples):
    """Numbers by which another problem is told, stored beside every state."""
    fields = [field.name for field in dataclasses.fields(method) if field.name not in ("loss", "prox", "mesh")]
    settings = repr((type(method).__name__, {name: getattr(method, name) for name in fields}))
    return {"settings": jnp.asarray([zlib.crc32(settings.encode())], jnp.uint32), "samples": _digest(samples)}


@jax.jit
def _digest(samples):
    """A number for each leaf, the same on every device, that other samples or another order would hardly have.

    References:
        Appleby, MurmurHash3: the last step for 32 bits, of each entry and its place.
    """

    def of_leaf(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = jax.lax.bitcast_convert_type(leaf, f"uint{jnp.finfo(leaf.dtype).bits}")
        bits = leaf.reshape(-1).astype(jnp.uint32)
        if leaf.dtype.itemsize == 8:
            bits = bits ^ (leaf.reshape(-1) >> 32).astype(jnp.uint32)
        mixed = bits + jnp.arange(bits.size, dtype=jnp.uint32) * np.uint32(0x9E3779B1)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
        # Modulo 2^32, a sum does not depend on its order.
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return jnp.stack(jax.tree.leaves(jax.tree.map(of_leaf, samples)))
