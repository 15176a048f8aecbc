"""Defines a convolutional network for images of 28 x 28, as `flax.nnx` module."""

from flax import nnx
from jaxtyping import Array, Float

from .layers import ConvBatchNorm


class ConvNet(nnx.Module):
    r"""Classifies images by three convolutions, with batch normalisation and max pooling.

    ======  ==================================  ============  ======================================
    layer   operation                           output        multiplications (28 x 28 x 1 images)
    ======  ==================================  ============  ======================================
    conv1   3 x 3 convolution, relu             28 x 28 x 32                                 225,792
    \        2 x 2 max pooling                  14 x 14 x 32
    conv2   3 x 3 convolution, relu             14 x 14 x 64                               3,612,672
    \        2 x 2 max pooling                  7 x 7 x 64
    conv3   3 x 3 convolution, relu             7 x 7 x 128                                3,612,672
    dense   mean over the image, then logits    classes                                        1,280
    ======  ==================================  ============  ======================================

    94,186 parameters and 7,452,416 multiplications for 28 x 28 x 1 images in ten classes.

    Args:
        num_channels: Channels of the images.
        num_classes: Number of logits.
        rngs: Flax's random streams, for the initial weights.
    """

    def __init__(self, num_channels: int = 1, num_classes: int = 10, *, rngs: nnx.Rngs):
        self.conv1 = ConvBatchNorm(num_channels, 32, rngs=rngs)
        self.conv2 = ConvBatchNorm(32, 64, rngs=rngs)
        self.conv3 = ConvBatchNorm(64, 128, rngs=rngs)
        self.dense = nnx.Linear(128, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Computes logits of a batch of images with values in [0, 1]."""
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.dense(nnx.relu(self.conv3(x)).mean(axis=(1, 2)))
