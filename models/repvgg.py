"""Defines RepVGG (Ding et al. 2021) as `flax.nnx` module, in the form for training and in the one for inference."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from .layers import ConvBatchNorm, make_stages


@dataclass(frozen=True)
class RepVGGConfig:
    """Holds the sizes of a RepVGG: a stem of one block, then four stages whose first block has a stride.

    Attributes:
        blocks: Blocks of each stage.
        widths: Channels of the stem, then of each stage.
        strides: Step in pixels of the stem, then of each stage's first block: (2, 2, 2, 2, 2) for images of 224 x 224
            (ImageNet), (1, 1, 2, 2, 2) for 32 x 32 (CIFAR).
        num_channels: Channels of the images.
        num_classes: Number of logits.
        is_merged: Whether every block is the one convolution that its branches add up to: the form for inference.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[int, ...] = (2, 2, 2, 2, 2)
    num_channels: int = 3
    num_classes: int = 1000
    is_merged: bool = False

    def __post_init__(self):
        sizes = (len(self.blocks) + 1, len(self.widths), len(self.strides))
        if len(set(sizes)) != 1:
            raise ValueError(
                f"widths and strides must have an entry for the stem and for each of the {len(self.blocks)} stages of "
                f"blocks, got {self.widths} and {self.strides}"
            )

    @classmethod
    def small(cls, *, num_classes: int = 10, **kwargs) -> "RepVGGConfig":
        """Makes one for images of 32 x 32 that a CPU trains in hours: 24 million multiplications an image."""
        return cls((2, 3, 3, 1), (32, 32, 64, 128, 256), (2, 1, 2, 2, 1), num_classes=num_classes, **kwargs)

    @classmethod
    def a0(cls, **kwargs) -> "RepVGGConfig":
        """RepVGG-A0: 8.3 million parameters when merged, 1.4 billion multiplications an image of 224 x 224."""
        return cls((2, 4, 14, 1), (48, 48, 96, 192, 1280), **kwargs)

    @classmethod
    def a1(cls, **kwargs) -> "RepVGGConfig":
        """RepVGG-A1: 12.8 million parameters when merged, 2.4 billion multiplications."""
        return cls((2, 4, 14, 1), (64, 64, 128, 256, 1280), **kwargs)

    @classmethod
    def a2(cls, **kwargs) -> "RepVGGConfig":
        """RepVGG-A2: 25.5 million parameters when merged, 5.1 billion multiplications."""
        return cls((2, 4, 14, 1), (64, 96, 192, 384, 1408), **kwargs)


class RepVGG(nnx.Module):
    """Classifies images by a plain stack of 3 x 3 convolutions, which has parallel branches while it is trained.

    `merge_branches` converts a trained network to the form for inference.

    Args:
        config: The sizes.
        rngs: Flax's random streams, for the initial weights.

    References:
        Ding, Zhang, Ma, Han, Ding, Sun (2021). RepVGG: making VGG-style ConvNets great again. CVPR; arXiv 2101.03697.
    """

    def __init__(self, config: RepVGGConfig, *, rngs: nnx.Rngs):
        self.config = config
        block = MergedBlock if config.is_merged else BranchedBlock
        stem_width, *widths = config.widths
        stem_stride, *strides = config.strides
        self.stem = block(config.num_channels, stem_width, stem_stride, rngs=rngs)
        self.stages = make_stages(
            lambda inputs, outputs, stride: block(inputs, outputs, stride, rngs=rngs),
            stem_width,
            config.blocks,
            widths,
            strides,
        )
        self.head = nnx.Linear(config.widths[-1], config.num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Computes logits of a batch of images, of any height and width."""
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def merge_branches(model: RepVGG) -> RepVGG:
    r"""Converts a trained network to the form for inference, which computes the same as the network in evaluation mode.

    Each branch is linear in evaluation mode. A convolution with kernel :math:`W`, normalised with mean :math:`\mu`,
    variance :math:`\sigma^2`, scale :math:`\gamma` and bias :math:`\beta`, is one with kernel and bias

    .. math:: W \gamma / \sqrt{\sigma^2 + \epsilon}, \qquad \beta - \mu \gamma / \sqrt{\sigma^2 + \epsilon}.

    A 1 x 1 kernel is the centre of a 3 x 3 kernel, and the input itself a convolution with the identity at the centre,
    so a block's kernels and biases add up to one convolution's. The sums are computed in float64 and rounded once.

    Args:
        model: The network with branches; it is not changed.

    Returns:
        A network whose `config.is_merged` is true, with kernels (3, 3, channels, features) in float32.

    Raises:
        ValueError: If the network is merged already.

    References:
        Ding, Zhang, Ma, Han, Ding, Sun (2021). RepVGG: making VGG-style ConvNets great again. CVPR; arXiv 2101.03697,
        section 3.3.
    """
    if model.config.is_merged:
        raise ValueError("model must have branches, got one with is_merged=True; use it as it is")
    merged = nnx.eval_shape(lambda: RepVGG(replace(model.config, is_merged=True), rngs=nnx.Rngs(0)))
    blocks = [model.stem, *(block for stage in model.stages for block in stage)]
    merged_blocks = [merged.stem, *(block for stage in merged.stages for block in stage)]
    for block, merged_block in zip(blocks, merged_blocks, strict=True):
        kernel, bias = _fold(np.asarray(block.dense.conv.kernel[...], np.float64), block.dense.norm)
        branches = [(np.asarray(block.pointwise.conv.kernel[...], np.float64), block.pointwise.norm)]
        if block.identity is not None:
            branches.append((np.eye(kernel.shape[-1])[None, None], block.identity))
        for centre, norm in branches:
            folded, shift = _fold(centre, norm)
            kernel[1:2, 1:2] += folded
            bias += shift
        merged_block.conv.kernel = nnx.Param(jnp.asarray(kernel, jnp.float32))
        merged_block.conv.bias = nnx.Param(jnp.asarray(bias, jnp.float32))
    merged.head = nnx.clone(model.head)
    merged.eval()
    return merged


def _fold(kernel: np.ndarray, norm: nnx.BatchNorm) -> tuple[np.ndarray, np.ndarray]:
    state = nnx.to_pure_dict(nnx.state(norm, (nnx.Param, nnx.BatchStat)))
    scale, bias, mean, var = (np.asarray(state[name], np.float64) for name in ("scale", "bias", "mean", "var"))
    factor = scale / np.sqrt(var + norm.epsilon)
    return kernel * factor, bias - mean * factor


class BranchedBlock(nnx.Module):
    """Adds a 3 x 3 convolution, a 1 x 1 convolution and, where sizes do not change, the input; each normalised."""

    def __init__(self, in_features: int, out_features: int, stride: int, *, rngs: nnx.Rngs):
        self.dense = ConvBatchNorm(in_features, out_features, 3, stride, rngs=rngs)
        self.pointwise = ConvBatchNorm(in_features, out_features, 1, stride, rngs=rngs)
        keeps_sizes = stride == 1 and in_features == out_features
        self.identity = nnx.BatchNorm(out_features, momentum=0.9, epsilon=1e-5, rngs=rngs) if keeps_sizes else None

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Computes the block's features."""
        y = self.dense(x) + self.pointwise(x)
        return nnx.relu(y if self.identity is None else y + self.identity(x).astype(x.dtype))


class MergedBlock(nnx.Module):
    """Applies one 3 x 3 convolution with bias."""

    def __init__(self, in_features: int, out_features: int, stride: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(in_features, out_features, (3, 3), stride, padding=1, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Computes the block's features."""
        return nnx.relu(self.conv(x))
