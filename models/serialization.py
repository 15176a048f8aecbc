"""Stores trained weights of `flax.nnx` modules in safetensors files."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file


def save(model: nnx.Module, path: Path) -> None:
    """Writes parameters and running averages, each under its path in the module, such as `conv1.kernel`.

    Args:
        model: The module.
        path: The file to write, in a folder that is made if it does not exist.
    """
    state = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({path_name(key): np.asarray(leaf) for key, leaf in leaves}, path)


def load(model: nnx.Module, path: Path) -> None:
    """Reads weights that `save` wrote into a module of the same architecture, and puts it in evaluation mode.

    Args:
        model: The module; changed in place.
        path: The file.

    Raises:
        ValueError: If the file's names or shapes are not the module's.
    """
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    tree = nnx.to_pure_dict(state)
    stored = load_file(path)
    expected = {path_name(key): np.shape(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    shapes = {name: array.shape for name, array in stored.items()}
    if shapes != expected:
        different = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {', '.join(different[:5])} differ; train it anew"
        )
    nnx.replace_by_pure_dict(state, jax.tree_util.tree_map_with_path(lambda key, _: stored[path_name(key)], tree))
    nnx.update(model, state)
    model.eval()


def num_parameters(model: nnx.Module) -> int:
    """Counts the trained numbers of an nnx module."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def path_name(key) -> str:
    """Names a leaf by its path in a tree, such as `conv1.kernel`."""
    return jax.tree_util.keystr(key, simple=True, separator=".")
