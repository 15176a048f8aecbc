"""Makes more inputs out of a sample of images; the model itself answers them, so that no answer is assumed."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float32, PyTree

# Images of which the model's answers are compared with those to their changed copies.
_NUM_PROBES = 256
# A change is natural if the changed images' answers explain this share of the images' own answers' variance. Other
# shares were not tried; a network that learned mirrored digits would spend its capacity on them.
_LEAST_EXPLAINED = 0.5
_SHIFT = 1 / 8

# From a batch of images, a tree of one leaf (B, height, width, channels), to the model's answers as rows.
Answer = Callable[[PyTree[np.ndarray]], np.ndarray]
# From images (B, height, width, channels), at random, to as many.
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def natural_changes(
    inputs: PyTree[np.ndarray],
    targets: Float32[np.ndarray, "batch numbers"],
    answer: Answer,
    rng: np.random.Generator,
) -> list[Change]:
    """Finds which of mirroring and shifting images the model answers alike.

    Args:
        inputs: Images, a tree of one leaf (B, height, width, channels).
        targets: The model's answers to them, as rows.
        answer: Computes the model's answers to images.
        rng: Draws the changes.

    Returns:
        The changes, as `augment` makes them.
    """
    probes = jax.tree.map(lambda leaf: leaf[:_NUM_PROBES], inputs)

    def is_natural(change):
        changed = jax.tree.map(lambda images: change(images, rng), probes)
        return _explained(answer(changed), targets[:_NUM_PROBES]) >= _LEAST_EXPLAINED

    return [change for change in (_mirror, _shift) if is_natural(change)]


def augment(
    inputs: PyTree[np.ndarray],
    targets: Float32[np.ndarray, "batch numbers"],
    answer: Answer,
    changes: Sequence[Change],
    num_copies: int,
    rng: np.random.Generator,
) -> tuple[PyTree[np.ndarray], Float32[np.ndarray, "more numbers"]]:
    """Adds changed copies of images.

    Args:
        inputs: Images, a tree of one leaf (B, height, width, channels).
        targets: The model's answers to them, as rows.
        answer: Computes the model's answers to images.
        changes: Each copy is changed by all of them; if there are none, there are no copies.
        num_copies: How many copies to add.
        rng: Draws the changes.

    Returns:
        The images and their copies, and the answers to all of them.
    """
    if not changes or num_copies < 1:
        return inputs, targets
    rows = rng.permutation(np.arange(num_copies) % len(targets))
    copies = jax.tree.map(lambda images: images[rows], inputs)
    for change in changes:
        copies = jax.tree.map(lambda images, change=change: change(images, rng), copies)
    augmented = jax.tree.map(lambda *leaves: np.concatenate(leaves), inputs, copies)
    return augmented, np.concatenate([targets, answer(copies)])


def _explained(found, expected):
    variance = np.sum((expected - expected.mean(axis=0)) ** 2)
    return 1 - np.sum((found - expected) ** 2) / max(variance, 1e-30)


def _mirror(images, rng):
    """Mirrors every image with probability 1/2."""
    is_mirrored = rng.random(len(images)) < 0.5
    return np.where(is_mirrored[:, None, None, None], images[:, :, ::-1], images)


def _shift(images, rng):
    """Shifts every image by up to an eighth of its height and width; its edges are repeated."""
    margins = [max(1, round(size * _SHIFT)) for size in images.shape[1:3]]
    padded = np.pad(images, ((0, 0), *[(margin, margin) for margin in margins], (0, 0)), mode="edge")
    offsets = [rng.integers(2 * margin + 1, size=len(images)) for margin in margins]
    rows, columns = (offset[:, None] + np.arange(size) for offset, size in zip(offsets, images.shape[1:3], strict=True))
    return padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
