"""Stores states in checkpoints, and recognises those of another problem."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, PyTree, UInt32

from ._digests import function_digest, text_digest
from .state import State

# Fields that are not digested with the settings: functions have digests of their own, a mesh changes no results.
_EXCLUDED_FIELDS = ("loss", "prox", "mesh")
# What differs where a digest does, for errors.
_DIFFERENCES = {
    "settings": "another method or other settings",
    "loss": "another loss",
    "prox": "another prox",
    "samples": "other samples, or of the same in another order",
}


@final
class Checkpoints:
    """Writes states of one problem to a folder, and reads the newest of them.

    Each state is stored with digests of the method's settings, its loss, its prox and the samples, by which checkpoints
    of another problem are refused, and with a checksum. A context manager.

    Args:
        folder: Where checkpoints are; made if it does not exist.
        method: The method.
        state: A state of it, for its samples and the shapes of its parameters.

    Raises:
        ImportError: If orbax is not installed.
    """

    def __init__(self, folder: str | Path, method: Any, state: State):
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise ImportError("checkpoint needs orbax: pip install 'jaxcode[train]'") from error
        self._args = ocp.args
        self._folder = Path(folder).absolute()
        self._digests = problem_digests(method, state)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=2),
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    def restore(self, template: State) -> State | None:
        """Reads the newest checkpoint that is readable, and deletes newer ones with a warning.

        Args:
            template: A state with the shapes, dtypes and devices of the one to read, and with its samples.

        Returns:
            The state; None if the folder has no checkpoint.

        Raises:
            ValueError: If the checkpoint is of another problem, or none is readable.
        """
        failures: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                shapes = self._stored_shapes(step)
            except Exception as failure:
                failures[step] = failure
                continue
            leaves, structure = jax.tree.flatten(template.without_data())
            stored = _number_leaves(leaves) | self._digests
            stored["checksum"] = jax.ShapeDtypeStruct((len(stored),), np.uint32)
            if shapes != {name: tuple(leaf.shape) for name, leaf in stored.items()}:
                raise ValueError(f"checkpoint {self._folder} is of another method or other samples: it has {shapes}")
            try:
                arrays = self._read(step, stored)
            except Exception as failure:
                failures[step] = failure
                continue
            # Outside of the try block, as an error in this comparison would be a bug and no damaged file.
            if not np.array_equal(arrays.pop("checksum"), checksums(arrays)):
                failures[step] = OSError("wrong checksum")
                continue
            self._check_problem(arrays)
            self._delete_unreadable(failures, step)
            leaves = [arrays.get(str(i), leaf) for i, leaf in enumerate(leaves)]
            return dataclasses.replace(template, **jax.tree.unflatten(structure, leaves))
        if failures:
            reasons = "; ".join(f"round {step}: {_first_line(failure)}" for step, failure in failures.items())
            raise ValueError(
                f"checkpoint {self._folder} cannot be read ({reasons}); delete it to start from the beginning"
            )
        return None

    def save(self, state: State) -> None:
        """Writes a state; only the newest two are kept."""
        arrays = _number_leaves(jax.tree.leaves(state.without_data())) | self._digests
        arrays["checksum"] = jax.device_put(checksums(arrays))
        self._manager.save(int(jax.device_get(state.round)), args=self._args.StandardSave(arrays))

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def _check_problem(self, arrays):
        for name, digest in self._digests.items():
            if not np.array_equal(arrays[name], digest):
                raise ValueError(
                    f"checkpoint {self._folder} is of {_DIFFERENCES[name]}; expected the problem of this run, or "
                    "another folder"
                )

    def _delete_unreadable(self, failures, step):
        for failed_step, failure in failures.items():
            warnings.warn(
                f"checkpoint {self._folder / str(failed_step)} cannot be read ({_first_line(failure)}); it is deleted, "
                f"and the run resumes from round {step}",
                stacklevel=3,
            )
            self._manager.delete(failed_step)

    def _stored_shapes(self, step):
        shapes = {name: tuple(entry.shape) for name, entry in dict(self._manager.item_metadata(step)).items()}
        if not shapes:
            raise OSError("no metadata")
        return shapes

    def _read(self, step, stored):
        templates = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
            for name, leaf in stored.items()
        }
        return dict(self._manager.restore(step, args=self._args.StandardRestore(templates)))


def problem_digests(method: Any, state: State) -> dict[str, Integer[Array, "..."]]:
    """Computes digests of a method's settings, loss and prox, and of the samples, by which problems are compared."""
    fields = [field.name for field in dataclasses.fields(method) if field.name not in _EXCLUDED_FIELDS]
    settings = repr((type(method).__name__, {name: getattr(method, name) for name in fields}))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state.params)
    sample = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), state.data.samples)
    # Losses that differ only in their rules of differentiation have the same value, not the same derivative.
    loss = function_digest(jax.value_and_grad(method.loss), params, sample)
    prox = getattr(method, "prox", None)
    step_size = jax.ShapeDtypeStruct((), state.step_size.dtype)
    digests = {
        "settings": text_digest(settings),
        "loss": loss,
        "prox": text_digest("none") if prox is None else function_digest(prox, params, step_size),
    }
    return jax.device_put({**digests, "samples": checksums(state.data.samples)})


def checksums(tree: PyTree[Array]) -> UInt32[np.ndarray, "leaves"]:
    """Computes a checksum of each array: the same on all devices, and another if entries or their order change.

    References:
        Appleby, MurmurHash3: its 32-bit finaliser, of each entry and its position.
    """
    return np.stack([jax.device_get(_checksum(leaf)) for leaf in jax.tree.leaves(tree)])


@jax.jit
def _checksum(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        leaf = jax.lax.bitcast_convert_type(leaf, f"uint{jnp.finfo(leaf.dtype).bits}")
    bits = leaf.astype(jnp.uint32)
    if leaf.dtype.itemsize == 8:
        bits = bits ^ (leaf >> 32).astype(jnp.uint32)
    # The flat position, without a reshape, which arrays distributed over a mesh would not allow.
    position, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        steps = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        position, stride = position + steps * np.uint32(stride % 2**32), stride * leaf.shape[axis]
    hashes = bits + position * np.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashes = (hashes ^ (hashes >> shift)) * np.uint32(factor)
    # Modulo 2^32, a sum does not depend on its order.
    return jnp.sum(hashes ^ (hashes >> 16), dtype=jnp.uint32)


def _number_leaves(leaves):
    """Names leaves by their index, except empty ones, which orbax cannot store."""
    return {str(i): leaf for i, leaf in enumerate(leaves) if np.size(leaf)}


def _first_line(failure):
    lines = str(failure).splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:200]
