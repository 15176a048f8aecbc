"""Defines the residual networks for images of 32 x 32 (He et al. 2016), as `flax.nnx` modules."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .layers import ConvBatchNorm, make_stages


@dataclass(frozen=True)
class ResNetConfig:
    """Holds the sizes of a residual network.

    Attributes:
        blocks: Residual blocks of each stage. Every stage but the first halves height and width.
        widths: Channels of each stage.
        num_channels: Channels of the images.
        num_classes: Number of logits.
        projects: Where a block changes sizes, whether its input passes through a 1 x 1 convolution with batch
            normalisation (option B of the paper), instead of being subsampled and padded with zeros (option A, the
            paper's for CIFAR-10).
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...] = (16, 32, 64)
    num_channels: int = 3
    num_classes: int = 10
    projects: bool = False

    def __post_init__(self):
        if len(self.widths) != len(self.blocks):
            raise ValueError(
                f"widths must have an entry for each of the {len(self.blocks)} stages of blocks, got {self.widths}"
            )
        if not self.projects and list(self.widths) != sorted(self.widths):
            raise ValueError(f"widths must not decrease unless projects=True, got {self.widths}")

    @classmethod
    def resnet20(cls, **kwargs) -> "ResNetConfig":
        """ResNet-20: 269,722 parameters, 41 million multiplications an image of 32 x 32 x 3."""
        return cls((3, 3, 3), **kwargs)

    @classmethod
    def resnet56(cls, **kwargs) -> "ResNetConfig":
        """ResNet-56: 853,018 parameters, 125 million multiplications."""
        return cls((9, 9, 9), **kwargs)


class ResNet(nnx.Module):
    """Classifies images by residual blocks of two 3 x 3 convolutions, at 32 x 32, 16 x 16 and 8 x 8 pixels.

    Args:
        config: The sizes.
        rngs: Flax's random streams, for the initial weights.

    References:
        He, Zhang, Ren, Sun (2016). Deep residual learning for image recognition. CVPR; arXiv 1512.03385, section 4.2.
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.stem = ConvBatchNorm(config.num_channels, config.widths[0], rngs=rngs)
        self.stages = make_stages(
            lambda inputs, outputs, stride: ResidualBlock(inputs, outputs, stride, config.projects, rngs=rngs),
            config.widths[0],
            config.blocks,
            config.widths,
            (1,) + (2,) * (len(config.blocks) - 1),
        )
        self.head = nnx.Linear(config.widths[-1], config.num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Computes logits of a batch of images, of any height and width."""
        x = nnx.relu(self.stem(x))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class ResidualBlock(nnx.Module):
    """Adds two 3 x 3 convolutions of the input to the input itself, or to a shortcut where sizes change."""

    def __init__(self, in_features: int, out_features: int, stride: int, projects: bool, *, rngs: nnx.Rngs):
        self.first = ConvBatchNorm(in_features, out_features, stride=stride, rngs=rngs)
        self.second = ConvBatchNorm(out_features, out_features, rngs=rngs)
        self.stride = stride
        self.padding = out_features - in_features
        changes = stride != 1 or in_features != out_features
        self.shortcut = ConvBatchNorm(in_features, out_features, 1, stride, rngs=rngs) if changes and projects else None

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Computes the block's features."""
        y = self.second(nnx.relu(self.first(x)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        else:
            before = self.padding // 2
            x = x[:, :: self.stride, :: self.stride]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, self.padding - before)))
        return nnx.relu(x + y)
