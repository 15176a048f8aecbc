"""Defines the vision transformer (Dosovitskiy et al. 2021) as `flax.nnx` module."""

import math
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
        has_class_token: Whether logits are computed from a class token, as in the published weights; otherwise from the
            mean of the patches' tokens (Beyer et al. 2022, arXiv 2205.01580).
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
    has_class_token: bool = True

    def __post_init__(self):
        for name in ("image_size", "patch_size", "width", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
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
        """Makes one for small images, with a mean of tokens in place of a class token, that a CPU trains in hours."""
        sizes = (image_size, patch_size, 96, 6, 3, 192)
        return cls(*sizes, num_classes=num_classes, has_class_token=False, **kwargs)

    @classmethod
    def small16(cls, *, image_size: int = 224, **kwargs) -> "ViTConfig":
        """ViT-S/16: 22 million parameters."""
        return cls(image_size, 16, 384, 12, 6, 1536, **kwargs)

    @classmethod
    def base16(cls, *, image_size: int = 224, **kwargs) -> "ViTConfig":
        """ViT-B/16: 86 million parameters, 17 billion multiplications an image of 224 x 224."""
        return cls(image_size, 16, 768, 12, 12, 3072, **kwargs)


class ViT(nnx.Module):
    """Classifies images by a transformer over their patches and, if configured, a class token.

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
        self.class_token = nnx.Param(jnp.zeros((1, 1, config.width))) if config.has_class_token else None
        num_tokens = config.num_patches + config.has_class_token
        self.position_embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, num_tokens, config.width)))
        self.blocks = nnx.List(
            [
                TransformerBlock(config.width, config.num_heads, config.mlp_width, epsilon=config.epsilon, rngs=rngs)
                for _ in range(config.depth)
            ]
        )
        self.norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.head = nnx.Linear(config.width, config.num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Computes logits of a batch of images of the configured size.

        Raises:
            ValueError: If the images have another size.
        """
        size = self.config.image_size
        if x.shape[1:3] != (size, size):
            raise ValueError(f"x must be images of {size} x {size}, got shape {x.shape}; resize them")
        x = self.patch_embedding(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.class_token is not None:
            token = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[-1]))
            x = jnp.concatenate([token, x], axis=1)
        x = x + self.position_embedding[...]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(axis=1) if self.class_token is None else x[:, 0])


class TransformerBlock(nnx.Module):
    """Applies self-attention, then an MLP, each to the normalised tokens and added to them.

    Args:
        width: Features of a token.
        num_heads: Attention heads, a divisor of `width`.
        mlp_width: Hidden features of the MLP.
        epsilon: Added to variances by layer normalisation.
        rngs: Flax's random streams, for the initial weights.
    """

    def __init__(self, width: int, num_heads: int, mlp_width: int, *, epsilon: float = 1e-6, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.attention = SelfAttention(width, num_heads, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.dense1 = nnx.Linear(width, mlp_width, rngs=rngs)
        self.dense2 = nnx.Linear(mlp_width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Computes the block's tokens."""
        x = x + self.attention(self.norm1(x))
        # Tokens of all images as one matrix: on CPUs, gradients of products of arrays with three axes take longer.
        flat = self.norm2(x).reshape(-1, x.shape[-1])
        flat = self.dense2(nnx.gelu(self.dense1(flat), approximate=False))
        return x + flat.reshape(x.shape)


class SelfAttention(nnx.Module):
    """Applies multi-head self-attention.

    One product makes queries, keys and values, from one kernel, as in timm's weights. `nnx.MultiHeadAttention` has
    three kernels, and takes longer to train on CPUs.

    Args:
        width: Features of a token.
        num_heads: Attention heads, a divisor of `width`.
        rngs: Flax's random streams, for the initial weights.
    """

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Computes, for every token, the projected mean of the values of all, weighted by attention."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x.reshape(-1, width)).reshape(batch, tokens, 3, self.num_heads, -1)
        query, key, value = jnp.moveaxis(qkv, (2, 3), (0, 2))
        scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
        mixed = (nnx.softmax(scores) @ value).swapaxes(1, 2)
        return self.out(mixed.reshape(-1, width)).reshape(x.shape)
