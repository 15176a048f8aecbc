"""Defines a small residual network (He et al. 2016) for images of about 32 x 32, as `flax.nnx` module."""

from flax import nnx
from jaxtyping import Array, Float


class ResNet14(nnx.Module):
    """Classifies images by 14 residual layers that halve them early, so that two cores train them in minutes.

    ========  =======================================  =============
    layer     operation                                output
    ========  =======================================  =============
    stem      3 x 3 convolution, stride 2              16 x 16 x 32
    blocks1   2 residual blocks                        16 x 16 x 32
    blocks2   2 residual blocks, the first of stride 2  8 x 8 x 64
    blocks3   2 residual blocks, the first of stride 2  4 x 4 x 128
    dense     mean over the image, then logits         classes
    ========  =======================================  =============

    696,618 parameters for 32 x 32 x 3 images in ten classes. The stem's stride is a departure from the paper, whose
    networks for CIFAR-10 keep 32 x 32 throughout their first third, at six times the cost.

    Args:
        image_shape: (height, width, channels), height and width at least 8.
        num_classes: Number of logits.
        rngs: Flax's random streams, for the initial weights.

    Raises:
        ValueError: If the images are smaller than 8 x 8.

    References:
        He, Zhang, Ren, Sun (2016). Deep residual learning for image recognition. CVPR; arXiv 1512.03385, section 4.2.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, *, rngs: nnx.Rngs):
        height, width, channels = image_shape
        if min(height, width) < 8:
            raise ValueError(f"ResNet14 takes images of at least 8 x 8, got {height} x {width}")
        self.stem = _Convolution(channels, 32, 2, rngs=rngs)
        sizes = [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        self.blocks = nnx.List([_Block(*size, rngs=rngs) for size in sizes])
        self.dense = nnx.Linear(128, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Computes logits of a batch of images with values in [0, 1]."""
        x = nnx.relu(self.stem(2 * x - 1))
        for block in self.blocks:
            x = block(x)
        return self.dense(x.mean(axis=(1, 2)))


class _Convolution(nnx.Module):
    """Applies a convolution, 3 x 3 by default, with batch normalisation in place of a bias."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, size: int = 3, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(inputs, outputs, (size, size), stride, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class _Block(nnx.Module):
    """Adds two convolutions to the input itself, or to a 1 x 1 convolution of it where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        self.first = _Convolution(inputs, outputs, stride, rngs=rngs)
        self.second = _Convolution(outputs, outputs, rngs=rngs)
        keeps_sizes = inputs == outputs and stride == 1
        self.shortcut = None if keeps_sizes else _Convolution(inputs, outputs, stride, 1, rngs=rngs)

    def __call__(self, x):
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return nnx.relu(shortcut + self.second(nnx.relu(self.first(x))))
