"""Makes more inputs out of a sample; the model itself answers them, so that no answer is assumed."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float32, PyTree

from .students import find_sequences, has_tokens

# Inputs of which the model's answers are compared with those to their changed copies.
_NUM_PROBES = 256
# A change of images is natural if the changed images' answers explain this share of the images' own answers' variance.
# Other shares were not tried; a network that learned mirrored digits would spend its capacity on them.
_LEAST_EXPLAINED = 0.5
# New pairs of sequences are natural if the mean of their answers is less than this off, in standard deviations, and
# their standard deviation by less than this factor. Other limits were not tried: of a model that finds most new pairs
# alike, a network would learn these instead of what tells apart those that come.
_MOST_OFF, _MOST_SPREAD = 0.5, 1.5
_SHIFT = 1 / 8

# From a batch, leaves (B, ...), to the model's answers as rows.
Answer = Callable[[PyTree[np.ndarray]], np.ndarray]
# From a batch, leaves (B, ...), at random, to as many inputs.
Change = Callable[[PyTree[np.ndarray], np.random.Generator], PyTree[np.ndarray]]


def natural_changes(
    inputs: PyTree[np.ndarray],
    targets: Float32[np.ndarray, "batch numbers"],
    answer: Answer,
    rng: np.random.Generator,
) -> list[Change]:
    """Finds changes by which inputs stay such as may come.

    Args:
        inputs: Leaves (B, ...): images, a tree of one leaf (B, height, width, channels), or sequences of tokens.
        targets: The model's answers to them, as rows.
        answer: Computes the model's answers to more inputs.
        rng: Draws the changes.

    Returns:
        Of mirroring and shifting images, those that the model answers alike. Of two sequences or more, such as a query
        and a document, new pairs, if the model's answers to these are distributed like those to the inputs.
    """
    probes, own = jax.tree.map(lambda leaf: leaf[:_NUM_PROBES], (inputs, targets))
    if has_tokens(inputs):
        is_paired = len(find_sequences(inputs)) > 1
        return [_pair_anew] if is_paired and _is_distributed_like(answer(_pair_anew(probes, rng)), own) else []
    return [change for change in (_mirror, _shift) if _explained(answer(change(probes, rng)), own) >= _LEAST_EXPLAINED]


def augment(
    inputs: PyTree[np.ndarray],
    targets: Float32[np.ndarray, "batch numbers"],
    answer: Answer,
    changes: Sequence[Change],
    num_copies: int,
    rng: np.random.Generator,
) -> tuple[PyTree[np.ndarray], Float32[np.ndarray, "more numbers"]]:
    """Adds changed copies of inputs.

    Args:
        inputs: Leaves (B, ...).
        targets: The model's answers to them, as rows.
        answer: Computes the model's answers to more inputs.
        changes: Each copy is changed by all of them; if there are none, there are no copies.
        num_copies: How many copies to add.
        rng: Draws the changes.

    Returns:
        The inputs and their copies, and the answers to all of them.
    """
    if not changes or num_copies < 1:
        return inputs, targets
    rows = rng.permutation(np.arange(num_copies) % len(targets))
    copies = jax.tree.map(lambda leaf: leaf[rows], inputs)
    for change in changes:
        copies = change(copies, rng)
    augmented = jax.tree.map(lambda *leaves: np.concatenate(leaves), inputs, copies)
    return augmented, np.concatenate([targets, answer(copies)])


def _explained(found, expected):
    variance = np.sum((expected - expected.mean(axis=0)) ** 2)
    return 1 - np.sum((found - expected) ** 2) / max(variance, 1e-30)


def _is_distributed_like(found, expected):
    scale = expected.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    off = np.sqrt(np.mean(((found.mean(axis=0) - expected.mean(axis=0)) / scale) ** 2))
    spread = np.sqrt(np.mean((found.std(axis=0) / scale) ** 2))
    return off < _MOST_OFF and 1 / _MOST_SPREAD < spread < _MOST_SPREAD


def _pair_anew(inputs, rng):
    """Pairs each input's first sequence with other inputs' further ones; all other leaves stay where they are."""
    leaves, structure = jax.tree.flatten(inputs)
    for sequence in find_sequences(inputs)[1:]:
        rows = rng.permutation(len(leaves[0]))
        for index in (sequence.tokens, *sequence.masks):
            leaves[index] = leaves[index][rows]
    return jax.tree.unflatten(structure, leaves)


def _mirror(inputs, rng):
    """Mirrors every image with probability 1/2."""
    is_mirrored = rng.random(len(jax.tree.leaves(inputs)[0])) < 0.5
    return jax.tree.map(lambda images: np.where(is_mirrored[:, None, None, None], images[:, :, ::-1], images), inputs)


def _shift(inputs, rng):
    """Shifts every image by up to an eighth of its height and width; its edges are repeated."""
    return jax.tree.map(lambda images: _shift_images(images, rng), inputs)


def _shift_images(images, rng):
    margins = [max(1, round(size * _SHIFT)) for size in images.shape[1:3]]
    padded = np.pad(images, ((0, 0), *[(margin, margin) for margin in margins], (0, 0)), mode="edge")
    offsets = [rng.integers(2 * margin + 1, size=len(images)) for margin in margins]
    rows, columns = (offset[:, None] + np.arange(size) for offset, size in zip(offsets, images.shape[1:3], strict=True))
    return padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
