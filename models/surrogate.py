"""Distils a cheap model of a classifier from its own answers, as a baseline that codes must beat."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Float32, Int, PyTree

from .training import compute_logits

_PATCH = 6
_STRIDE = 2
_POOLS = 3
_RIDGES = 10.0 ** np.arange(-4, 6)


@dataclass(frozen=True, eq=False)
class PatchSurrogate:
    """Predicts logits by ridge regression on pooled responses to random patches of images.

    Attributes:
        kernel: Whitened patches, as a convolution's kernel (6, 6, channels, filters).
        centre: Medians of the responses, (filters,).
        threshold: How far from the centre a response must be to count, (filters,).
        weights: Of the features, (features, classes).
        offset: Added to the logits, (classes,).
        cost: Multiplications for an image, relative to the classifier's operations, counted in pairs.

    References:
        Coates, Lee, Ng (2011). An analysis of single-layer networks in unsupervised feature learning. AISTATS.
    """

    kernel: Float[Array, "rows columns channels filters"]
    centre: Float[Array, "filters"]
    threshold: Float[Array, "filters"]
    weights: Float[Array, "features classes"]
    offset: Float[Array, "classes"]
    cost: float

    def __call__(self, images: Float[ArrayLike, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Predicts the logits of a batch."""
        return _features(images, self.kernel, self.centre, self.threshold) @ self.weights + self.offset

    def fill(self, results, is_lost, images):
        """Gives every lost input its predicted logits; a `comparison.Fill`."""
        return jnp.where(is_lost[:, None], self(images), results)

    def order(self, inputs: PyTree, num_data: int) -> Int[Array, "batch"]:
        """Orders each group of K by the margin of its predicted classes, the least certain first.

        `jc.ReplicationCode` gives the first inputs of a group one copy more where K does not divide N.
        """
        top = jnp.sort(self(inputs), axis=1)
        margin = top[:, -1] - top[:, -2]
        starts = range(0, len(margin), num_data)
        return jnp.concatenate([start + jnp.argsort(margin[start : start + num_data]) for start in starts])


def distil(
    model: nnx.Module,
    images: Float32[np.ndarray, "images height width channels"],
    *,
    cost: float = 0.13,
    seed: int = 0,
) -> PatchSurrogate:
    """Fits a surrogate to a classifier's answers; labels are not needed.

    Needs scikit-learn.

    Args:
        model: The classifier, from images to logits.
        images: Images; the ridge is chosen by leaving out one at a time.
        cost: Multiplications that it may take, relative to the classifier's; it has at least one filter.
        seed: Seed of patches.
    """
    from sklearn import linear_model

    logits = compute_logits(model, images)
    height, width, channels = images.shape[1:]
    positions = ((height - _PATCH) // _STRIDE + 1) * ((width - _PATCH) // _STRIDE + 1)
    graph, state = nnx.split(model)
    analysis = jax.jit(lambda x: nnx.merge(graph, state)(x)).lower(images[:1]).cost_analysis()
    assert analysis is not None
    multiplications = analysis["flops"] / 2
    per_filter = positions * _PATCH**2 * channels + 2 * _POOLS**2 * logits.shape[1]
    num_filters = max(1, int(cost * multiplications / per_filter))
    filters = _draw_filters(images, num_filters, np.random.default_rng(seed))
    compute = jax.jit(_features)
    parts = (images[start : start + 500] for start in range(0, len(images), 500))
    features = np.concatenate([np.asarray(compute(part, *filters)) for part in parts])
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-9
    fit = linear_model.RidgeCV(_RIDGES).fit(((features - mean) / scale).astype(np.float64), logits)
    weights = (fit.coef_ / scale).T
    kernel, centre, threshold, weights, offset = (
        jnp.asarray(array, jnp.float32) for array in (*filters, weights, fit.intercept_ - mean @ weights)
    )
    return PatchSurrogate(kernel, centre, threshold, weights, offset, num_filters * per_filter / multiplications)


def _draw_filters(images, num_filters: int, rng):
    """Draws patches of images, whitens them, and finds the median of responses to them and of distances from it."""
    channels = images.shape[-1]
    patches = _draw_patches(images, 10_000, rng)
    mean = patches.mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov(patches.T))
    # Directions of hardly any variance are noise.
    whitening = (axes / np.sqrt(variances + 0.01 * variances.max())) @ axes.T
    filters = (_draw_patches(images, num_filters, rng) - mean) @ whitening
    filters /= np.linalg.norm(filters, axis=1, keepdims=True) + 1e-6
    kernel = (filters @ whitening).T
    responses = patches @ kernel
    centre = np.median(responses, axis=0)
    return kernel.reshape(_PATCH, _PATCH, channels, num_filters), centre, np.median(abs(responses - centre), axis=0)


def _draw_patches(images, count: int, rng):
    indices = rng.integers(len(images), size=count)
    rows, columns = (rng.integers(size - _PATCH + 1, size=count) for size in images.shape[1:3])
    patches = [images[i, r : r + _PATCH, c : c + _PATCH] for i, r, c in zip(indices, rows, columns, strict=True)]
    return np.stack(patches).reshape(count, -1).astype(np.float64)


def _features(images, kernel, centre, threshold):
    """Computes how much farther than the threshold responses are from their centre, on either side, in 3 x 3 means."""
    images = jnp.asarray(images)
    responses = jax.lax.conv_general_dilated(
        images,
        jnp.asarray(kernel, images.dtype),
        (_STRIDE, _STRIDE),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    centre, threshold = (jnp.asarray(array, images.dtype) for array in (centre, threshold))
    responses = responses - centre
    both = jnp.concatenate([jax.nn.relu(responses - threshold), jax.nn.relu(-responses - threshold)], axis=-1)
    rows, columns = (np.linspace(0, size, _POOLS + 1).astype(int) for size in both.shape[1:3])
    pools = [
        both[:, rows[i] : rows[i + 1], columns[j] : columns[j + 1]].mean(axis=(1, 2))
        for i in range(_POOLS)
        for j in range(_POOLS)
    ]
    return jnp.concatenate(pools, axis=-1)
