"""Small networks that learn a model's answers: for images, for vectors and for sequences of tokens."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, PyTree

from .features import average_parts, flatten_inputs

# Ratios of the widths of an image student's convolutions, and the strides of all but the first.
_RATIOS = (2, 3, 4, 8)
_STRIDES = (2, 1, 2)
# The first convolution makes images about this wide.
_STEM_SIZE = 16
_NUM_PARTS = 2
_NUM_HIDDEN = 2


@final
@dataclasses.dataclass(frozen=True)
class Architecture:
    """Describes a network, so that one with the same shapes can be made again.

    Attributes:
        kind: "image", "vector" or "token".
        shape: Of one input.
        num_outputs: Numbers in one answer.
        width: The network's width.
        num_tokens: Different tokens, for "token"; else 0.
    """

    kind: str
    shape: tuple[int, ...]
    num_outputs: int
    width: int
    num_tokens: int = 0

    def build(self) -> nnx.Module:
        """Makes a network whose parameters are still to be set."""
        inputs, targets = np.zeros((2, *self.shape), np.float32), np.zeros((2, self.num_outputs), np.float32)
        if self.kind == "token":
            inputs = np.full((2, *self.shape), self.num_tokens - 2)
        return STUDENTS[self.kind](inputs, targets, self.width, rngs=nnx.Rngs(0))


class Buffer(nnx.Variable):
    """Holds numbers that training does not change."""


class Standardise(nnx.Module):
    """Shifts and scales numbers to mean 0 and standard deviation 1, or back.

    Args:
        sample: Numbers, (B, ..., features).
    """

    def __init__(self, sample: Float32[np.ndarray, "*batch features"]):
        axes = tuple(range(sample.ndim - 1))
        mean, scale = sample.mean(axis=axes, dtype=np.float64), sample.std(axis=axes, dtype=np.float64)
        # Features that hardly vary are noise, and stay small.
        scale = np.maximum(scale, 1e-3 * scale.max()) if scale.max() > 0 else np.ones_like(scale)
        self.mean = Buffer(jnp.asarray(mean, jnp.float32))
        self.scale = Buffer(jnp.asarray(scale, jnp.float32))

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Standardises."""
        return (x - self.mean[...]) / self.scale[...]

    def inverse(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Undoes it."""
        return x * self.scale[...] + self.mean[...]


class ImageStudent(nnx.Module):
    """Four convolutions, means over quarters of the image, and a linear layer.

    Args:
        images: A sample, (B, height, width, channels).
        targets: Answers as rows, (any number, numbers).
        width: Half the channels after the first convolution.
        rngs: Flax's random streams, for the initial weights.
    """

    def __init__(
        self,
        images: Float32[np.ndarray, "batch height width channels"],
        targets: Float32[np.ndarray, "answers numbers"],
        width: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.inputs, self.outputs = Standardise(images), Standardise(targets)
        self.convolutions, self.norms = nnx.List(), nnx.List()
        channels = images.shape[-1]
        for kernel, stride, ratio in _stages(images.shape[1:3]):
            self.convolutions.append(
                nnx.Conv(
                    channels,
                    ratio * width,
                    (kernel, kernel),
                    stride,
                    use_bias=False,
                    kernel_init=nnx.initializers.he_normal(),
                    rngs=rngs,
                )
            )
            channels = ratio * width
            self.norms.append(nnx.BatchNorm(channels, momentum=0.9, rngs=rngs))
        num_parts = math.prod(min(_NUM_PARTS, size) for size in _sizes(images.shape[1:3])[-1])
        self.head = nnx.Linear(channels * num_parts, targets.shape[1], rngs=rngs)

    def __call__(self, x: PyTree[ArrayLike]) -> Float[Array, "batch numbers"]:
        """Guesses the answers to a batch, one leaf (B, height, width, channels)."""
        (images,) = jax.tree.leaves(x)
        hidden = self.inputs(jnp.asarray(images, jnp.float32))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = nnx.relu(norm(convolution(hidden)))
        return self.outputs.inverse(self.head(average_parts(hidden, _NUM_PARTS)))


def _stages(size: Sequence[int]):
    """Lists kernel size, stride and width ratio of each convolution for images of a size."""
    first = max(1, round(min(size) / _STEM_SIZE))
    return list(zip((max(3, 2 * first - 1), 3, 3, 3), (first, *_STRIDES), _RATIOS, strict=True))


def _sizes(size: Sequence[int]):
    """Lists heights and widths after each convolution."""
    sizes = []
    for _, stride, _ in _stages(size):
        size = tuple(-(-length // stride) for length in size)
        sizes.append(size)
    return sizes


def image_width(size: Sequence[int], channels: int, num_outputs: int, multiplications: float) -> int:
    """Returns the largest width whose network takes at most so many multiplications for an image; at least 1."""

    def count(width):
        total, in_channels = 0, channels
        for (kernel, _, ratio), (rows, columns) in zip(_stages(size), _sizes(size), strict=True):
            total += rows * columns * kernel**2 * in_channels * ratio * width
            in_channels = ratio * width
        return total + _NUM_PARTS**2 * in_channels * num_outputs

    width = 1
    while count(width + 1) <= multiplications:
        width += 1
    return width


class VectorStudent(nnx.Module):
    """A perceptron with two hidden layers.

    Args:
        rows: The numbers of a sample's inputs, (B, input numbers).
        targets: Answers as rows, (any number, numbers).
        width: Of the hidden layers.
        rngs: Flax's random streams, for the initial weights.
    """

    def __init__(
        self,
        rows: Float32[np.ndarray, "batch inputs"],
        targets: Float32[np.ndarray, "answers numbers"],
        width: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.inputs, self.outputs = Standardise(rows), Standardise(targets)
        widths = (rows.shape[1], *[width] * _NUM_HIDDEN)
        self.layers = nnx.List(nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(widths))
        self.head = nnx.Linear(width, targets.shape[1], rngs=rngs)

    def __call__(self, x: PyTree[ArrayLike]) -> Float[Array, "batch numbers"]:
        """Guesses the answers to a batch, leaves (B, ...)."""
        hidden = self.inputs(flatten_inputs(x))
        for layer in self.layers:
            hidden = nnx.silu(layer(hidden))
        return self.outputs.inverse(self.head(hidden))


def vector_width(num_inputs: int, num_outputs: int, multiplications: float) -> int:
    """Returns the largest width whose network takes at most so many multiplications for an input; at least 1."""
    linear = num_inputs + num_outputs
    square = _NUM_HIDDEN - 1
    return max(1, int((math.sqrt(linear**2 + 4 * square * multiplications) - linear) / (2 * square)))


class TokenStudent(nnx.Module):
    """Embeds tokens, convolves them with their neighbours, and takes the mean and the maximum over the sequence.

    Args:
        tokens: A sample, integers (B, length).
        targets: Answers as rows, (any number, numbers).
        width: Of embeddings and convolutions.
        rngs: Flax's random streams, for the initial weights.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        targets: Float32[np.ndarray, "answers numbers"],
        width: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.outputs = Standardise(targets)
        # One more, for tokens that the sample does not have.
        self.num_tokens = int(tokens.max()) + 2
        self.embedding = nnx.Embed(self.num_tokens, width, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((tokens.shape[1], width)))
        self.convolution = nnx.Conv(width, width, (3,), rngs=rngs)
        self.head = nnx.Linear(2 * width, targets.shape[1], rngs=rngs)

    def __call__(self, x: PyTree[ArrayLike]) -> Float[Array, "batch numbers"]:
        """Guesses the answers to a batch, one leaf (B, length)."""
        (tokens,) = jax.tree.leaves(x)
        embedded = self.embedding(jnp.clip(jnp.asarray(tokens), 0, self.num_tokens - 1)) + self.position[...]
        hidden = nnx.silu(self.convolution(embedded))
        pooled = jnp.concatenate([hidden.mean(axis=1), hidden.max(axis=1)], axis=-1)
        return self.outputs.inverse(self.head(pooled))


def token_width(length: int, num_outputs: int, multiplications: float) -> int:
    """Returns the largest width whose network takes at most so many multiplications for an input; at least 1."""
    square, linear = 3 * length, 2 * num_outputs
    return max(1, int((math.sqrt(linear**2 + 4 * square * multiplications) - linear) / (2 * square)))


STUDENTS = {"image": ImageStudent, "vector": VectorStudent, "token": TokenStudent}
