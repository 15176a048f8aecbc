"""Stores objects of this package in safetensors files: arrays as tensors, everything else as JSON in the header.

Nothing in a file is executed: classes are those in a list below, functions those in another.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from .functions import Model, as_pure_function

_VERSION = "1"


def save(path: str | Path, value: Any) -> None:
    """Writes an object to a file.

    Args:
        path: The file, which is replaced only when all has been written.
        value: Made of this package's classes, arrays, numbers, strings, tuples, lists and dictionaries.

    Raises:
        ValueError: If a part is of another class, or a function that is not this package's.
        OSError: If the file cannot be written.
    """
    writer = _Writer()
    metadata = {"jaxcode": _VERSION, "object": json.dumps(writer.encode(value, "object"))}
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    safetensors.numpy.save_file(writer.arrays, temporary, metadata)
    temporary.replace(path)


def load(path: str | Path, kind: type, functions: Mapping[str, Model | None]) -> Any:
    """Reads an object from a file.

    Args:
        path: The file.
        kind: The class expected.
        functions: The user's functions and modules that the object was made with, by the names of those arguments,
            "model" and "features"; None if not given.

    Raises:
        ValueError: If the file holds no such object, or needs a function that is not given.
        OSError: If it cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); expected one that jaxcode wrote") from None
    if metadata.get("jaxcode") != _VERSION:
        raise ValueError(f"{path} was not written by this version of jaxcode; expected one that {kind.__name__} saved")
    try:
        value = _Reader(arrays, functions).decode(json.loads(metadata["object"]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); expected a file that jaxcode wrote") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a {kind.__name__}")
    return value


@final
class _Writer:
    """Encodes objects as JSON, and collects their arrays by name."""

    def __init__(self):
        self.arrays: dict[str, np.ndarray] = {}

    def encode(self, value: Any, name: str) -> Any:
        """Encodes a value; `name` is where it is, for errors and arrays."""
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            self.arrays[name] = np.ascontiguousarray(value)
            return {"array": name, "shape": list(np.shape(value))}
        if isinstance(value, list | tuple):
            items = [self.encode(item, f"{name}.{i}") for i, item in enumerate(value)]
            return {type(value).__name__: items}
        if isinstance(value, dict):
            return {"dict": [[self.encode(k, name), self.encode(v, f"{name}.{k}")] for k, v in value.items()]}
        for known, constant in _constants().items():
            if value is constant:
                return {"constant": known}
        if isinstance(value, jax.tree_util.PyTreeDef):
            return {"tree": self.encode(jax.tree.unflatten(value, range(value.num_leaves)), name)}
        class_name = type(value).__name__
        if _classes().get(class_name) is not type(value):
            raise ValueError(
                f"{name} is {value!r}, which cannot be saved; expected objects of jaxcode's own classes: save what "
                "made it, and make it again"
            )
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if "fn" in fields:
            # A function is made again from its architecture, or given by whoever loads it.
            del fields["fn"]
            fields["params"] = jax.tree.leaves(fields["params"])
        encoded = {key: self.encode(item, f"{name}.{key}") for key, item in fields.items()}
        return {"class": class_name, "fields": encoded}


@final
class _Reader:
    """Decodes what a writer encoded."""

    def __init__(self, arrays: Mapping[str, np.ndarray], functions: Mapping[str, Model | None]):
        self._arrays, self._functions = arrays, functions

    def decode(self, value: Any) -> Any:
        """Decodes a value."""
        if not isinstance(value, dict):
            return value
        (tag, content), *_ = value.items()
        if tag == "float":
            return float(content)
        if tag == "array":
            return self._arrays[content].reshape(value["shape"])
        if tag in ("list", "tuple"):
            items = [self.decode(item) for item in content]
            return tuple(items) if tag == "tuple" else items
        if tag == "dict":
            return {self.decode(key): self.decode(item) for key, item in content}
        if tag == "constant":
            return _constants()[content]
        if tag == "tree":
            return jax.tree.structure(self.decode(content))
        cls = _classes()[content]
        fields = {key: self.decode(item) for key, item in value["fields"].items()}
        if "params" in fields:
            fields["fn"], fields["params"] = self._restore(content, fields["params"], fields.get("architecture"))
        return cls(**fields)

    def _restore(self, class_name, leaves, architecture):
        """Makes the pure function of a stored predictor, and its parameters from their leaves."""
        name = "model" if class_name == "ModulePredictor" else "features"
        model = self._functions[name] if architecture is None else architecture.build()
        if model is None:
            raise ValueError(
                f"{name} is None; expected the {name} with which the surrogate was distilled: give it again"
            )
        fn, params = as_pure_function(model)
        expected, structure = jax.tree.flatten(params)
        shapes, found = ([np.shape(leaf) for leaf in group] for group in (expected, leaves))
        if shapes != found:
            raise ValueError(f"{name} has parameters of shapes {shapes}; expected {found}, those that were saved")
        return fn, jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])


def _constants() -> dict[str, Any]:
    """Lists functions and settings that files may name."""
    from . import ordering, outputs

    spaces = (outputs.as_returned, outputs.logits, outputs.probabilities)
    return {"ordering.greedy": ordering.greedy, **{f"outputs.{space.name}": space for space in spaces}}


def _classes() -> dict[str, type]:
    """Lists the classes that files may name."""
    from . import codes, interpolants, nodes, ordering, stragglers, tuning
    from .interpolants.kernel import Process
    from .surrogates import calibration, features, predictors, students

    listed = (
        *(getattr(interpolants, name) for name in ("Berrut", "FloaterHormann", "NotAKnot", "Polynomial", "Spline")),
        *(getattr(stragglers, name) for name in stragglers.__all__ if isinstance(getattr(stragglers, name), type)),
        calibration.Calibration,
        codes.InterpolatingCode,
        codes.KernelCode,
        codes.ReplicationCode,
        Process,
        features.FourierFeatures,
        features.ModuleFeatures,
        features.PatchFeatures,
        nodes.Nodes,
        ordering.Greedy,
        ordering.LinearFeatures,
        predictors.Layout,
        predictors.LinearPredictor,
        predictors.ModulePredictor,
        predictors.Surrogate,
        students.Architecture,
        tuning.Candidate,
        tuning.Tuned,
    )
    return {cls.__name__: cls for cls in listed}
