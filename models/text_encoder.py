"""Defines a small transformer that classifies sequences of tokens, as `flax.nnx` module in two parts."""

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float, Int

from .vit import TransformerBlock


@dataclass(frozen=True)
class TextEncoderConfig:
    """Holds the sizes of a text encoder.

    Attributes:
        num_tokens: Different tokens; that of padding is one of them.
        length: Tokens of an input.
        num_classes: Number of logits.
        width: Features of a token.
        depth: Number of transformer blocks.
        num_heads: Attention heads, a divisor of `width`.
        mlp_width: Hidden features of each block's MLP.
    """

    num_tokens: int
    length: int
    num_classes: int
    width: int = 64
    depth: int = 2
    num_heads: int = 4
    mlp_width: int = 128

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width, got {self.num_heads} and {self.width}")


class TextEncoder(nnx.Module):
    """Classifies texts by a transformer over their tokens and the mean of what it makes of them.

    It is `body` after `embed`: integers cannot be mixed, embeddings can, so that a code that mixes inputs has `embed`
    where the inputs are and `body` on the workers.

    Padding is a token like any other, so that the body needs no mask.

    Args:
        config: The sizes.
        rngs: Flax's random streams, for the initial weights.
    """

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.token_embedding = nnx.Embed(config.num_tokens, width, rngs=rngs)
        self.position_embedding = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (1, config.length, width)))
        self.blocks = nnx.List(
            [TransformerBlock(width, config.num_heads, config.mlp_width, rngs=rngs) for _ in range(config.depth)]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, config.num_classes, rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch classes"]:
        """Computes logits of a batch of texts.

        Raises:
            ValueError: If the texts have another length than the configured one.
        """
        return self.body(self.embed(tokens))

    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """Looks up what tokens and positions stand for.

        Raises:
            ValueError: If the texts have another length than the configured one.
        """
        if tokens.shape[1:] != (self.config.length,):
            raise ValueError(f"tokens must be texts of {self.config.length} tokens, got shape {tokens.shape}; pad them")
        return self.token_embedding(tokens) + self.position_embedding[...]

    def body(self, embedded: Float[Array, "batch length width"]) -> Float[Array, "batch classes"]:
        """Computes logits of a batch of embedded texts, or of mixtures of them."""
        for block in self.blocks:
            embedded = block(embedded)
        return self.head(self.norm(embedded).mean(axis=1))
