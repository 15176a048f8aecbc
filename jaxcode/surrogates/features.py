"""Computes features in which a model's answers are nearly linear, drawn at random from a sample of its inputs."""

import math
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from .._pytree import pytree
from ..checks import batch_size
from ..functions import Params, PureFunction

_PATCH = 6
_STRIDE = 2
_POOLS = 3
_NUM_PATCHES = 10_000


def flatten_inputs(x: PyTree[ArrayLike]) -> Float[Array, "batch numbers"]:
    """Concatenates all numbers of each input, leaves (B, ...), in float32."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(x)]
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1).astype(jnp.float32) for leaf in leaves], axis=1)


def mean_and_scale(rows: Float[np.ndarray, "batch numbers"]) -> tuple[np.ndarray, np.ndarray]:
    """Computes the mean and the standard deviation of each number.

    A number that does not vary has an infinite standard deviation, and is zero when standardised.
    """
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    return mean, np.where(scale > 1e-6 * (scale.max() or 1.0), scale, np.inf)


@final
@pytree(eq=False)
class FourierFeatures:
    r"""Computes random Fourier features of vectors, and the vectors themselves.

    .. math:: \cos(\Omega^T z + \phi), \quad z = (x - \mu) / s

    Their products approximate a Gaussian kernel.

    Attributes:
        mean: Of the inputs, (numbers,).
        scale: Standard deviations of the inputs, (numbers,).
        frequencies: Normal, of the inverse length scale, (numbers, features).
        phases: Uniform on a circle, (features,).

    References:
        Rahimi, Recht (2007). Random features for large-scale kernel machines. NeurIPS.
    """

    mean: Float[Array | np.ndarray, "numbers"]
    scale: Float[Array | np.ndarray, "numbers"]
    frequencies: Float[Array | np.ndarray, "numbers features"]
    phases: Float[Array | np.ndarray, "features"]

    def __call__(self, x: PyTree[ArrayLike]) -> Float[Array, "batch features"]:
        """Computes the features of a batch, leaves (B, ...)."""
        standard = (flatten_inputs(x) - self.mean) / self.scale
        angles = jnp.matmul(standard, jnp.asarray(self.frequencies), precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([standard, jnp.cos(angles + self.phases)], axis=1)


def draw_fourier(inputs: PyTree[np.ndarray], num_features: int, length: float, seed: int) -> FourierFeatures:
    """Draws Fourier features.

    Args:
        inputs: A sample, leaves (B, ...).
        num_features: How many cosines.
        length: The kernel's length scale, in units of the median distance of two inputs.
        seed: Seed of frequencies and phases.
    """
    rng = np.random.default_rng(seed)
    rows = np.asarray(flatten_inputs(inputs), np.float64)
    mean, scale = mean_and_scale(rows)
    standard = (rows - mean) / scale
    pairs = rng.integers(len(rows), size=(2, 1000))
    distances = np.linalg.norm(standard[pairs[0]] - standard[pairs[1]], axis=1)
    unit = np.median(distances[distances > 0]) if (distances > 0).any() else 1.0
    frequencies = rng.standard_normal((rows.shape[1], num_features)) / (length * unit)
    phases = rng.uniform(0, 2 * math.pi, num_features)
    return FourierFeatures(*(array.astype(np.float32) for array in (mean, scale, frequencies, phases)))


@final
@pytree(eq=False)
class PatchFeatures:
    """Computes how strongly parts of an image respond to whitened patches of a sample of images.

    A response counts as far as it is farther than the median distance from the median response, on either side;
    responses are averaged over 3 x 3 parts of the image.

    Attributes:
        kernel: Whitened patches, as a convolution's kernel, (rows, columns, channels, filters).
        centre: Medians of the responses, (filters,).
        threshold: Median distances from them, (filters,).

    References:
        Coates, Lee, Ng (2011). An analysis of single-layer networks in unsupervised feature learning. AISTATS.
    """

    kernel: Float[Array | np.ndarray, "rows columns channels filters"]
    centre: Float[Array | np.ndarray, "filters"]
    threshold: Float[Array | np.ndarray, "filters"]

    def __call__(self, x: PyTree[ArrayLike]) -> Float[Array, "batch features"]:
        """Computes the features of a batch, one leaf (B, height, width, channels)."""
        (images,) = jax.tree.leaves(x)
        images = jnp.asarray(images, jnp.float32)
        responses = jax.lax.conv_general_dilated(
            images,
            jnp.asarray(self.kernel),
            (_STRIDE, _STRIDE),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        responses = responses - jnp.asarray(self.centre)
        sides = [jax.nn.relu(side - jnp.asarray(self.threshold)) for side in (responses, -responses)]
        return average_parts(jnp.concatenate(sides, axis=-1), _POOLS)


def average_parts(images: Float[Array, "batch rows columns channels"], num_parts: int) -> Float[Array, "batch parts"]:
    """Averages images over a grid of equal parts, `num_parts` in each direction, at most one for each pixel."""
    edges = [np.linspace(0, size, min(num_parts, size) + 1).astype(int) for size in images.shape[1:3]]
    parts = [
        images[:, top:bottom, left:right].mean(axis=(1, 2))
        for top, bottom in zip(edges[0][:-1], edges[0][1:], strict=True)
        for left, right in zip(edges[1][:-1], edges[1][1:], strict=True)
    ]
    return jnp.concatenate(parts, axis=-1)


def draw_patches(inputs: PyTree[np.ndarray], num_features: int, seed: int) -> PatchFeatures:
    """Draws patches of images and whitens them.

    Args:
        inputs: A sample, one leaf (B, height, width, channels).
        num_features: How many patches.
        seed: Seed of their places.
    """
    rng = np.random.default_rng(seed)
    (images,) = jax.tree.leaves(inputs)
    shape = (*(min(_PATCH, size) for size in images.shape[1:3]), images.shape[3])

    def draw(count):
        numbers = rng.integers(len(images), size=count)
        tops, lefts = (rng.integers(images.shape[i + 1] - shape[i] + 1, size=count) for i in range(2))
        drawn = zip(numbers, tops, lefts, strict=True)
        cut = [images[n, top : top + shape[0], left : left + shape[1]] for n, top, left in drawn]
        return np.stack(cut).reshape(count, -1).astype(np.float64)

    patches = draw(_NUM_PATCHES)
    mean = patches.mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov(patches.T).reshape(len(mean), len(mean)))
    # Directions of hardly any variance are noise.
    whitening = (axes / np.sqrt(np.maximum(variances, 0) + 0.01 * (variances.max() or 1.0))) @ axes.T
    filters = (draw(num_features) - mean) @ whitening
    filters /= np.linalg.norm(filters, axis=1, keepdims=True) + 1e-6
    kernel = (filters @ whitening).T
    responses = patches @ kernel
    centre = np.median(responses, axis=0)
    threshold = np.median(abs(responses - centre), axis=0)
    kernel = kernel.reshape(*shape, num_features)
    return PatchFeatures(*(array.astype(np.float32) for array in (kernel, centre, threshold)))


@final
@pytree("fn", eq=False)
class ModuleFeatures:
    """Computes features with a function or a module of the user's, such as the first layers of the model itself.

    Attributes:
        fn: From parameters and a batch, leaves (B, ...), to any floating-point numbers, leaves (B, ...).
        params: The parameters.
    """

    fn: PureFunction
    params: Params

    def __call__(self, x: PyTree[ArrayLike]) -> Float[Array, "batch features"]:
        """Computes the features of a batch, leaves (B, ...)."""
        features = self.fn(self.params, x)
        if batch_size("features", features) != batch_size("x", x):
            raise ValueError(
                f"features returned {batch_size('features', features)} rows for a batch of {batch_size('x', x)}; "
                "expected one row for each input"
            )
        return flatten_inputs(features)
