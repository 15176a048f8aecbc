"""Stores trained weights of `flax.nnx` modules in safetensors files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
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
        ValueError: If the file is damaged, or its names or shapes are not the module's.
    """
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    tree = nnx.to_pure_dict(state)
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error})") from error
    expected = {path_name(key): str(np.shape(leaf)) for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    if problems := compare_names({name: str(array.shape) for name, array in stored.items()}, expected):
        raise ValueError(
            f"{path} does not fit {type(model).__name__}; {problems}; load the network that it was saved from"
        )

    def weights(key, _):
        return jnp.asarray(stored[path_name(key)])

    nnx.replace_by_pure_dict(state, jax.tree_util.tree_map_with_path(weights, tree))
    nnx.update(model, state)
    model.eval()


def compare_names(found: dict[str, str], expected: dict[str, str]) -> str:
    """Lists the arrays of a file that are missing, left over, or not described as expected.

    Args:
        found: By name of the array, its description: its shape, for instance.
        expected: The descriptions that it must have.

    Returns:
        The lists, each with at most ten names; empty if all arrays are as expected.
    """
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "left over": sorted(found.keys() - expected.keys()),
        "wrong": [
            f"{name} is {found[name]}, must be {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if found[name] != expected[name]
        ],
    }
    return "; ".join(f"{problem}: {_list(lines)}" for problem, lines in problems.items() if lines)


def num_parameters(model: nnx.Module) -> int:
    """Counts the trained numbers of an nnx module."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def path_name(key) -> str:
    """Names a leaf by its path in a tree, such as `conv1.kernel`."""
    return jax.tree_util.keystr(key, simple=True, separator=".")


def _list(lines: list[str]) -> str:
    return ", ".join(lines[:10]) + (f" and {len(lines) - 10} more ({len(lines)} in all)" if len(lines) > 10 else "")
