"""Makes more inputs out of a sample of images; the model itself answers them, so that no answer is assumed."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

# Images of which the model's answers are compared with those to their changed copies.
_NUM_PROBES = 256
# A change is natural if the changed images' answers explain this share of the images' own answers' variance. Whether
# others help was not found to matter: a network that learns from upside-down digits spends its capacity on them.
_LEAST_EXPLAINED = 0.5
_SHIFT = 1 / 8

Answer = Callable[[np.ndarray], np.ndarray]


def augment(
    images: Float32[np.ndarray, "batch height width channels"],
    targets: Float32[np.ndarray, "batch numbers"],
    answer: Answer,
    num_images: int,
    seed: int,
) -> tuple[Float32[np.ndarray, "more height width channels"], Float32[np.ndarray, "more numbers"]]:
    """Adds mirrored and shifted copies of images, as far as the model answers these alike.

    Args:
        images: The sample.
        targets: The model's answers to it, as rows.
        answer: Computes the model's answers to images.
        num_images: How many copies to add.
        seed: Seed of the copies.

    Returns:
        The sample and its copies, and the answers to all of them.
    """
    rng = np.random.default_rng(seed)
    probes = slice(0, _NUM_PROBES)
    changes = [
        change
        for change in (_mirror, _shift)
        if _explained(answer(change(images[probes], rng)), targets[probes]) >= _LEAST_EXPLAINED
    ]
    if not changes or num_images < 1:
        return images, targets
    copies = images[rng.permutation(np.arange(num_images) % len(images))]
    for change in changes:
        copies = change(copies, rng)
    return np.concatenate([images, copies]), np.concatenate([targets, answer(copies)])


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
