"""Defines LeNet5 (LeCun et al. 1998) in both of Flax's interfaces."""

from typing import Any

import jax.numpy as jnp
from flax import linen, nnx
from jaxtyping import Array, Float

# Images of 28 x 28 are padded to the 32 x 32 that LeNet5 was designed for.
_PADDING = {28: 2, 32: 0}
_FLAT_FEATURES = 5 * 5 * 16


class LeNet5(nnx.Module):
    r"""Classifies images by LeNet5, as a `flax.nnx` module.

    ======  ========================  ============  ===============================
    layer   operation                 output        parameters (28 x 28 x 1 images)
    ======  ========================  ============  ===============================
    conv1   5 x 5 convolution, tanh   28 x 28 x 6                               156
    \        2 x 2 average pooling    14 x 14 x 6
    conv2   5 x 5 convolution, tanh   10 x 10 x 16                             2416
    \        2 x 2 average pooling    5 x 5 x 16
    dense1  tanh                      120                                     48120
    dense2  tanh                      84                                      10164
    dense3  logits                    classes                                   850
    ======  ========================  ============  ===============================

    61706 parameters for 28 x 28 x 1 images in ten classes, 62006 for 32 x 32 x 3. Departures from 1998, as in
    most present-day versions: the pooling has no trained coefficients, conv2 sees all six maps, and dense3
    replaces the radial basis functions. tanh and averaging, kept from 1998, make a smooth function.

    Args:
        image_shape: (height, width, channels), height = width = 28 (padded to 32) or 32.
        num_classes: Number of logits.
        rngs: Flax's random streams, for the initial weights.

    Raises:
        ValueError: If the images are neither 28 x 28 nor 32 x 32.

    References:
        LeCun, Bottou, Bengio, Haffner (1998). Gradient-based learning applied to document recognition.
        Proceedings of the IEEE 86(11), 2278-2324.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (28, 28, 1), num_classes: int = 10, *, rngs: nnx.Rngs):
        padding = _padding(image_shape)
        self.conv1 = nnx.Conv(image_shape[-1], 6, (5, 5), padding=padding, rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
        self.dense1 = nnx.Linear(_FLAT_FEATURES, 120, rngs=rngs)
        self.dense2 = nnx.Linear(120, 84, rngs=rngs)
        self.dense3 = nnx.Linear(84, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Computes logits of a batch of images with values in [0, 1]."""
        x = nnx.avg_pool(jnp.tanh(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.avg_pool(jnp.tanh(self.conv2(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        return self.dense3(jnp.tanh(self.dense2(jnp.tanh(self.dense1(x)))))


class LeNet5Linen(linen.Module):
    """Classifies images by LeNet5, as a `flax.linen` module of the same architecture and parameter names as `LeNet5`.

    Attributes:
        num_classes: Number of logits.

    Raises:
        ValueError: When initialised or applied, if the images are neither 28 x 28 nor 32 x 32.
    """

    num_classes: int = 10

    @linen.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Computes logits of a batch of images with values in [0, 1]."""
        padding = _padding(x.shape[1:])
        x = linen.avg_pool(jnp.tanh(linen.Conv(6, (5, 5), padding=padding, name="conv1")(x)), (2, 2), (2, 2))
        x = linen.avg_pool(jnp.tanh(linen.Conv(16, (5, 5), padding="VALID", name="conv2")(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = jnp.tanh(linen.Dense(120, name="dense1")(x))
        x = jnp.tanh(linen.Dense(84, name="dense2")(x))
        return linen.Dense(self.num_classes, name="dense3")(x)


def to_linen(model: LeNet5) -> dict[str, Any]:
    """Converts the weights of an nnx LeNet5 to variables for `LeNet5Linen`.

    Args:
        model: The nnx module; it is not changed.

    Returns:
        `variables` such that `LeNet5Linen(num_classes).apply(variables, x)` equals `model(x)`.
    """
    return {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}


def _padding(image_shape: tuple[int, ...]) -> int:
    height, width, _ = image_shape
    if height != width or height not in _PADDING:
        raise ValueError(f"LeNet5 takes images of 28 x 28 or 32 x 32, got {height} x {width}")
    return _PADDING[height]
