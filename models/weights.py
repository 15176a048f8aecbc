"""Trained weights of `flax.nnx` modules in safetensors files."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file


def save(model: nnx.Module, path: Path) -> None:
    """Writes parameters and running averages, each under its path in the module, such as `conv1.kernel`."""
    state = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({_name(key): np.asarray(leaf) for key, leaf in leaves}, path)


def load(model: nnx.Module, path: Path) -> None:
    """Reads weights that `save` wrote into a module of the same architecture, and put it in evaluation mode.

    Raises:
        ValueError: If the file's names or shapes are not the module's.
    """
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    pure = nnx.to_pure_dict(state)
    stored = load_file(path)
    expected = {_name(key): np.shape(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(pure)}
    found = {name: array.shape for name, array in stored.items()}
    if found != expected:
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise ValueError(f"{path} does not fit {type(model).__name__}: {', '.join(wrong[:5])} differ; train it anew")
    nnx.replace_by_pure_dict(state, jax.tree_util.tree_map_with_path(lambda key, _: stored[_name(key)], pure))
    nnx.update(model, state)
    model.eval()


def _name(key) -> str:
    return jax.tree_util.keystr(key, simple=True, separator=".")
