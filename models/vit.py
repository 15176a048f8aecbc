"""Defines the vision transformer (Dosovitskiy et al. 2021) as `flax.nnx` module."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@dataclass(frozen=True)
class ViTConfig:
    """Holds the sizes of a vision transformer.

    Attributes:
        image_size: Height and width of the images, in pixels, a multiple of `patch_size`.
        patch_size: Height and width of a patch, in pixels.
        width: Features of a token.
        depth: Number of transformer blocks.
        num_heads: Attention heads, a divisor of `width`.
        mlp_width: Hidden features of each block's MLP.
        num_channels: Channels of the images.
        num_classes: Number of logits.
        epsilon: Added to variances by layer normalisation: 1e-6 in timm's weights, 1e-12 in Hugging Face's.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    num_channels: int = 3
    num_classes: int = 1000
    epsilon: float = 1e-6

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width, got {self.num_heads} and {self.width}")

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def tiny(cls, *, image_size: int = 32, patch_size: int = 4, num_classes: int = 10, **kwargs) -> "ViTConfig":
        """Makes one for images of 32 x 32 that a CPU trains in two hours or three."""
        return cls(image_size, patch_size, 96, 6, 3, 192, num_classes=num_classes, **kwargs)

    @classmethod
    def small16(cls, *, image_size: int = 224, **kwargs) -> "ViTConfig":
        """ViT-S/16: 22 million parameters."""
        return cls(image_size, 16, 384, 12, 6, 1536, **kwargs)

    @classmethod
    def base16(cls, *, image_size: int = 224, **kwargs) -> "ViTConfig":
        """ViT-B/16: 86 million parameters, 17 billion multiplications an image of 224 x 224."""
        return cls(image_size, 16, 768, 12, 12, 3072, **kwargs)


class ViT(nnx.Module):
    """Classifies images by a transformer over their patches and a class token.

    Args:
        config: The sizes.
        rngs: Flax's random streams, for the initial weights.

    References:
        Dosovitskiy et al. (2021). An image is worth 16x16 words: transformers for image recognition at scale. ICLR;
        arXiv 2010.11929.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        patch = (config.patch_size, config.patch_size)
        self.patch_embedding = nnx.Conv(config.num_channels, config.width, patch, patch, padding="VALID", rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, config.width)))
        initial = nnx.initializers.normal(0.02)
        self.position_embedding = nnx.Param(initial(rngs.params(), (1, config.num_patches + 1, config.width)))
        self.blocks = nnx.List([TransformerBlock(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.head = nnx.Linear(config.width, config.num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Computes logits of a batch of images of the configured size."""
        x = self.patch_embedding(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.position_embedding[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class TransformerBlock(nnx.Module):
    """Applies self-attention, then an MLP, each to the normalised tokens and added to them."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(config.num_heads, config.width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.dense1 = nnx.Linear(config.width, config.mlp_width, rngs=rngs)
        self.dense2 = nnx.Linear(config.mlp_width, config.width, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Computes the block's tokens."""
        x = x + self.attention(self.norm1(x))
        return x + self.dense2(nnx.gelu(self.dense1(self.norm2(x)), approximate=False))
