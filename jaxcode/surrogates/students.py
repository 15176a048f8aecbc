"""Small networks that learn a model's answers: for images, for vectors and for sequences of tokens."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, final

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
# Weighted means over a sequence, beside the mean and the maximum.
_NUM_SCORES = 2
_MAX_TOKENS = 2**18
_SMALL = nnx.initializers.normal(0.02)


@final
@dataclasses.dataclass(frozen=True)
class Architecture:
    """Describes a network, so that one with the same shapes can be made again.

    Attributes:
        kind: "image", "vector" or "token".
        shapes: Of one input: of its leaves for "token", else of the one array that the network reads.
        num_outputs: Numbers in one answer.
        width: The network's width.
        num_tokens: Different tokens of each leaf, for "token"; else none.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    num_outputs: int
    width: int
    num_tokens: tuple[int, ...] = ()

    def build(self) -> nnx.Module:
        """Makes a network whose parameters are still to be set."""
        inputs = [np.zeros((2, *shape), np.float32) for shape in self.shapes]
        if self.kind == "token":
            # The highest token of a sample tells how many there are.
            counts = zip(inputs, self.num_tokens, strict=True)
            inputs = [np.full(leaf.shape, count - 2) if count else leaf for leaf, count in counts]
        sample = inputs if self.kind == "token" else inputs[0]
        targets = np.zeros((2, self.num_outputs), np.float32)
        return STUDENTS[self.kind](sample, targets, self.width, rngs=nnx.Rngs(0))


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
    """Embeds tokens, convolves them with their neighbours, and summarises every sequence for a linear layer.

    An input is a tree: a sequence of tokens, or several that are compared, such as a query and a document, with masks
    or types of their tokens and other numbers. A summary has the mean over the sequence, the maximum, and means
    weighted by learned scores. Beside them are the products of every two sequences' means.

    Args:
        inputs: A sample, a tree of leaves (B, ...); see `find_sequences`.
        targets: Answers as rows, (any number, numbers).
        width: Of the convolution; embeddings have half of it.
        rngs: Flax's random streams, for the initial weights.
    """

    def __init__(
        self,
        inputs: PyTree[np.ndarray],
        targets: Float32[np.ndarray, "answers numbers"],
        width: int,
        *,
        rngs: nnx.Rngs,
    ):
        leaves = jax.tree.leaves(inputs)
        self.outputs = Standardise(targets)
        self.counts = count_tokens(inputs)
        self.sequences = find_sequences(inputs)
        lengths = [leaves[sequence.tokens].reshape(len(leaves[0]), -1).shape[1] for sequence in self.sequences]
        # Of one vocabulary. A token that the sample does not have means nothing, and hardly counts.
        narrow = _embedding_width(width)
        self.embedding = nnx.Embed(max(self.counts), narrow, embedding_init=_SMALL, rngs=rngs)
        self.positions = nnx.List(nnx.Param(jnp.zeros((length, narrow))) for length in lengths)
        masks = [mask for sequence in self.sequences for mask in sequence.masks]
        self.gains = nnx.Dict({str(mask): nnx.Param(jnp.zeros((2, 2, narrow))) for mask in masks})
        self.convolution = nnx.Conv(narrow, width, (3,), rngs=rngs)
        self.scores = nnx.Linear(width, _NUM_SCORES, kernel_init=nnx.initializers.zeros, rngs=rngs)
        num_pairs = math.comb(len(self.sequences), 2)
        num_features = (len(self.sequences) * (2 + _NUM_SCORES) + num_pairs) * width
        numbers = self._numbers(leaves)
        self.numbers = Standardise(np.asarray(numbers)) if numbers.shape[1] else None
        self.hidden = nnx.Linear(num_features + numbers.shape[1], width, rngs=rngs)
        self.head = nnx.Linear(num_features + numbers.shape[1] + width, targets.shape[1], rngs=rngs)

    def __call__(self, x: PyTree[ArrayLike]) -> Float[Array, "batch numbers"]:
        """Guesses the answers to a batch, leaves (B, ...)."""
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(x)]
        features, means = [], []
        for sequence, position in zip(self.sequences, self.positions, strict=True):
            hidden = nnx.silu(self.convolution(self._embed(leaves, sequence) + position[...]))
            weights = nnx.softmax(self.scores(hidden), axis=1)
            weighted = jnp.einsum("blk,blw->bkw", weights, hidden)
            means.append(hidden.mean(axis=1))
            features += [means[-1], hidden.max(axis=1), weighted.reshape(weighted.shape[0], -1)]
        features += [first * second for first, second in itertools.combinations(means, 2)]
        if self.numbers is not None:
            features.append(self.numbers(self._numbers(leaves)))
        summary = jnp.concatenate(features, axis=-1)
        return self.outputs.inverse(self.head(jnp.concatenate([summary, nnx.silu(self.hidden(summary))], axis=-1)))

    def _embed(self, leaves, sequence):
        """Looks up tokens; a mask scales and shifts what they stand for, by amounts that are learned."""
        tokens = leaves[sequence.tokens].astype(jnp.int32).reshape(leaves[0].shape[0], -1)
        embedded = self.embedding(jnp.clip(tokens, 0, self.counts[sequence.tokens] - 1))
        for mask in sequence.masks:
            is_set = (leaves[mask] > 0).astype(jnp.int32).reshape(tokens.shape)
            scale, shift = self.gains[str(mask)][...][:, is_set]
            embedded = embedded * (1 + scale) + shift
        return embedded

    def _numbers(self, leaves):
        numbers = [leaf for leaf, count in zip(leaves, self.counts, strict=True) if not count]
        return flatten_inputs(numbers) if numbers else jnp.zeros((len(leaves[0]), 0))


def _embedding_width(width):
    return max(1, width // 2)


class TokenSequence(NamedTuple):
    """Says which leaves of an input are one sequence.

    Attributes:
        tokens: The number of the leaf of tokens.
        masks: The numbers of leaves that tell two kinds of these tokens apart.
    """

    tokens: int
    masks: tuple[int, ...]


def has_tokens(inputs: PyTree[np.ndarray]) -> bool:
    """Returns whether inputs, leaves (B, ...), have a sequence of integers (B, length), for `TokenStudent`."""
    leaves, counts = jax.tree.leaves(inputs), count_tokens(inputs)
    return any(
        count > 0 and leaf.ndim == 2 and leaf.shape[1] > 1 and leaf.dtype != bool
        for leaf, count in zip(leaves, counts, strict=True)
    )


def count_tokens(inputs: PyTree[np.ndarray]) -> tuple[int, ...]:
    """Counts the tokens of each leaf, with one more for those that the sample does not have.

    Counts are 0 for other numbers, which integers above the largest vocabularies are too.
    """

    def count(leaf):
        is_sequence = leaf.ndim <= 2 and (np.issubdtype(leaf.dtype, np.integer) or leaf.dtype == bool)
        return max(int(leaf.max()), 0) + 2 if is_sequence and leaf.max() < _MAX_TOKENS else 0

    return tuple(count(leaf) for leaf in jax.tree.leaves(inputs))


def find_sequences(inputs: PyTree[np.ndarray]) -> tuple[TokenSequence, ...]:
    """Finds the sequences among the leaves of inputs.

    Integers (B, length) or (B,) are tokens. Booleans, and integers of which none is above 1, are masks or types of the
    tokens that have the same shape, in the order of the leaves, if there are such tokens.

    Args:
        inputs: A sample, leaves (B, ...).

    Returns:
        The sequences, in the order of the leaves.

    >>> masked = {"ids": np.full((9, 4), 7), "mask": np.ones((9, 4), bool), "weight": np.zeros(9)}
    >>> find_sequences(masked)
    (TokenSequence(tokens=0, masks=(1,)),)
    """
    leaves, counts = jax.tree.leaves(inputs), count_tokens(inputs)
    is_mask = [0 < count <= 3 for count in counts]
    masks_of: dict[int, list[int]] = {i: [] for i, count in enumerate(counts) if count and not is_mask[i]}
    for shape in {leaf.shape for leaf in leaves}:
        tokens = [i for i in masks_of if leaves[i].shape == shape]
        masks = [i for i in range(len(leaves)) if is_mask[i] and leaves[i].shape == shape]
        for number, mask in enumerate(masks):
            if tokens:
                masks_of[tokens[number * len(tokens) // len(masks)]].append(mask)
            else:
                masks_of[mask] = []
    return tuple(TokenSequence(tokens, tuple(masks)) for tokens, masks in sorted(masks_of.items()))


def token_width(inputs: PyTree[np.ndarray], num_outputs: int, multiplications: float) -> int:
    """Returns the largest width whose network takes at most so many multiplications for an input; at least 1."""
    leaves, sequences = jax.tree.leaves(inputs), find_sequences(inputs)
    total_length = sum(math.prod(leaves[sequence.tokens].shape[1:]) for sequence in sequences)
    num_summaries = len(sequences) * (2 + _NUM_SCORES) + math.comb(len(sequences), 2)
    square = 1.5 * total_length + num_summaries
    linear = 2 * _NUM_SCORES * total_length + (num_summaries + 1) * num_outputs
    return max(1, int((math.sqrt(linear**2 + 4 * square * multiplications) - linear) / (2 * square)))


STUDENTS = {"image": ImageStudent, "vector": VectorStudent, "token": TokenStudent}
