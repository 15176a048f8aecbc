"""A cheap model of a model, which guesses its answers and how far off each guess is expected to be."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from .. import _storage
from .._pytree import pytree
from ..checks import batch_size
from ..functions import Model, Params, PureFunction
from .calibration import DISAGREEMENT, SQUARED_ERROR, Calibration, margins
from .features import flatten_inputs
from .students import Architecture

# From a batch, leaves (B, ...), to guesses as rows (B, numbers) and a score of each that grows with its error, (B,).
Predictor = Callable[[PyTree[Any]], tuple[Array, Array]]


@final
@pytree("structure", "shapes", "dtypes")
class Layout:
    """Describes a model's answer to one input: leaves, their shapes and dtypes.

    Attributes:
        structure: The tree.
        shapes: Of the leaves, without the batch.
        dtypes: Of the leaves, by name.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, answers: PyTree[ArrayLike]) -> "Layout":
        """Describes answers, leaves (B, ...)."""
        leaves, structure = jax.tree.flatten(answers)
        return cls(structure, tuple(np.shape(leaf)[1:] for leaf in leaves), tuple(leaf.dtype.name for leaf in leaves))

    @property
    def is_class_scores(self) -> bool:
        """Whether there is one array with an axis of at least two numbers, which may be scores of classes."""
        return len(self.shapes) == 1 and len(self.shapes[0]) == 1 and self.shapes[0][0] >= 2

    def from_rows(self, rows: Float[Array, "batch numbers"]) -> PyTree[Array]:
        """Splits rows, as `flatten_inputs` makes them of answers, into leaves (B, ...)."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        leaves = [
            columns.reshape(rows.shape[0], *shape).astype(dtype)
            for columns, shape, dtype in zip(jnp.split(rows, ends[:-1], axis=1), self.shapes, self.dtypes, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)


@final
@pytree(eq=False)
class LinearPredictor:
    """Guesses answers, and the logarithms of the guesses' squared errors, as linear functions of features.

    Attributes:
        features: Computes features of a batch, a pytree; (B, features).
        weights: (features, numbers + 1); the last column is that of the logarithms.
        offset: (numbers + 1,).
    """

    features: Callable[[PyTree[Any]], Array]
    weights: Float[Array | np.ndarray, "features outputs"]
    offset: Float[Array | np.ndarray, "outputs"]

    def __call__(self, x: PyTree[ArrayLike]) -> tuple[Float[Array, "batch numbers"], Float[Array, "batch"]]:
        """Returns guesses and scores."""
        outputs = jnp.matmul(self.features(x), jnp.asarray(self.weights), precision=jax.lax.Precision.HIGHEST)
        outputs = outputs + jnp.asarray(self.offset)
        return outputs[:, :-1], outputs[:, -1]


@final
@pytree("fn", "architecture", eq=False)
class ModulePredictor:
    """Guesses answers with a module, and scores guesses by themselves and by how far inputs are from the sample.

    Attributes:
        fn: From parameters and a batch, leaves (B, ...), to guesses like the model's answers.
        params: The module's parameters.
        mean: Of the sample's inputs, (input numbers,).
        scale: Standard deviations of the sample's inputs, (input numbers,).
        error_weights: Of the terms of the logarithm of the squared error, (2 numbers + 2,).
        architecture: Describes the module, so that it can be loaded; None for one of the user's own.
    """

    fn: PureFunction
    params: Params
    mean: Float[Array | np.ndarray, "numbers"]
    scale: Float[Array | np.ndarray, "numbers"]
    error_weights: Float[Array | np.ndarray, "terms"]
    architecture: Architecture | None = None

    def __call__(self, x: PyTree[ArrayLike]) -> tuple[Float[Array, "batch numbers"], Float[Array, "batch"]]:
        """Returns guesses and scores."""
        rows, terms = self.rows_and_terms(x)
        return rows, terms @ jnp.asarray(self.error_weights)

    def rows_and_terms(self, x: PyTree[ArrayLike]) -> tuple[Float[Array, "batch numbers"], Float[Array, "batch terms"]]:
        """Returns guesses, and what their scores are linear in: guesses, their squares, the input's mean square."""
        rows = flatten_inputs(self.fn(self.params, x))
        standard = (flatten_inputs(x) - jnp.asarray(self.mean)) / jnp.asarray(self.scale)
        distance = jnp.mean(jnp.square(standard), axis=1, keepdims=True)
        return rows, jnp.concatenate([rows, rows**2, distance, jnp.log1p(distance)], axis=1)


@final
@pytree("layout", "cost", eq=False)
class Surrogate:
    """Guesses a model's answers at a fraction of its cost; made by `jaxcode.surrogate`.

    A pytree whose leaves are parameters: it can be passed to jitted functions, differentiated and sent to other
    processes.

    Attributes:
        predictor: Computes guesses and their scores.
        class_risk: From a guess's negative margin to the probability that the model names another class; None where
            answers are not scores of classes.
        value_risk: From a guess's score to its expected squared error.
        layout: What the model's answers look like.
        cost: Multiplications and additions for an input, relative to the model's.
    """

    predictor: Predictor
    class_risk: Calibration | None
    value_risk: Calibration
    layout: Layout
    cost: float

    @property
    def losses(self) -> tuple[str, ...]:
        """Which losses it can estimate: "squared_error", and for scores of classes "disagreement"."""
        return (SQUARED_ERROR,) if self.class_risk is None else (SQUARED_ERROR, DISAGREEMENT)

    def __call__(self, x: PyTree[ArrayLike]) -> PyTree[Array]:
        """Guesses the model's answers to a batch, leaves (B, ...), in their dtypes."""
        batch_size("x", x)
        with _in_standard_modes():
            return self.layout.from_rows(self.predictor(x)[0])

    def with_risk(self, x: PyTree[ArrayLike], loss: str = SQUARED_ERROR) -> tuple[PyTree[Array], Float[Array, "batch"]]:
        """Guesses the model's answers to a batch, and what each guess is expected to cost.

        Args:
            x: The batch, leaves (B, ...).
            loss: "disagreement", for the probability that the model names another class; or "squared_error", for the
                mean over an answer's numbers of the squared error, in the square of their unit.

        Returns:
            The guesses, leaves (B, ...); and the expected losses, (B,).

        Raises:
            ValueError: If loss is not one of `losses`, or the leading axes of x differ or are 0.
        """
        batch_size("x", x)
        if loss not in self.losses:
            raise ValueError(f"loss is {loss!r}; expected one that this surrogate estimates: {', '.join(self.losses)}")
        with _in_standard_modes():
            rows, scores = self.predictor(x)
            if loss == DISAGREEMENT and self.class_risk is not None:
                risk = self.class_risk(-margins(rows))
            else:
                risk = self.value_risk(scores)
            return self.layout.from_rows(rows), risk

    def save(self, path: str | Path) -> None:
        """Writes it to a safetensors file, from which `jaxcode.load_surrogate` reads it.

        Args:
            path: The file; replaced if it exists.

        Raises:
            OSError: If it cannot be written.
        """
        _storage.save(path, self)

    def __repr__(self) -> str:
        return f"Surrogate({type(self.predictor).__name__}, cost={self.cost:.3g}, losses={self.losses})"


@contextlib.contextmanager
def _in_standard_modes():
    """Lets dtypes and ranks be promoted, which parameters in float32 and modules of flax rely on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def load_surrogate(path: str | Path, *, model: nnx.Module | None = None, features: Model | None = None) -> Surrogate:
    """Reads a surrogate from a file that `Surrogate.save` wrote.

    Args:
        path: The file.
        model: The network that `jaxcode.surrogate` was given, if it was; its parameters are read from the file.
        features: The features that `jaxcode.surrogate` was given, if it was.

    Returns:
        The surrogate.

    Raises:
        ValueError: If the file holds no surrogate, or one made with a model or features that are not given or do not
            have its shapes.
        OSError: If it cannot be read.
    """
    return _storage.load(path, Surrogate, {"model": model, "features": features})
