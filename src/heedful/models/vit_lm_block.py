"""A vision transformer that ends in a frozen block of a language model."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from heedful.mixers.heads.frozen_lm_block import FrozenLMBlock
from heedful.models.deit import DeiT, DenseAttention
from heedful.registry import register

# A block of LLaMA-7B (202 387 456 parameters, its norm included), two maps and the vision transformer.
CONFIGS = {
    "vit_lm_tiny": {"parameters": 209_677_736, "arguments": {"dim": 192, "heads": 3}},
    "vit_lm_small": {"parameters": 227_583_848, "arguments": {}},
    "vit_lm_base": {"parameters": 295_246_568, "arguments": {"dim": 768, "heads": 12}},
}


@register(
    "vit-lm-block-backbone", kind="model", paper="frozen-lm-block", tags=("image", "dense", "pretrained")
)
class ViTWithLMBlock(DeiT):
    """Vision transformer whose tokens go through a block of a language model before the last norm.

        block:  x += attention(LN(x));   x += mlp(LN(x));       in the end  y = head(LN(lm(x))_class)

    classes, in_channels, features_only  see `Backbone`; the map is that behind the language model
    dim, depth, image_size, patch, mlp_ratio, drop_path  see `DeiT`
    heads  of each block
    lm_dim, lm_heads, lm_hidden, frozen  of the language model's block, see `FrozenLMBlock`

    The default is a block of LLaMA-7B, with random weights: `heedful.convert.frozen_lm_block` makes one of a
    pretrained model, to put in place of `lm`.
    Source: Frozen Transformers in Language Models Are Effective Visual Encoder Layers, arXiv 2310.12973.
    """

    # With frozen weights not every parameter would get a gradient, which is a check.
    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "dim": 12,
        "depth": 2,
        "heads": 3,
        "lm_dim": 24,
        "lm_heads": 4,
        "lm_hidden": 20,
        "frozen": False,
        "image_size": 48,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        lm_dim: int = 4096,
        lm_heads: int = 32,
        lm_hidden: int = 11008,
        frozen: bool = True,
        image_size: int = 224,
        patch: int = 16,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            lambda _: DenseAttention(dim, heads=heads),
            classes=classes,
            in_channels=in_channels,
            features_only=features_only,
            dim=dim,
            depth=depth,
            image_size=image_size,
            patch=patch,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
        )
        self.lm = FrozenLMBlock(dim, lm_dim=lm_dim, heads=lm_heads, hidden=lm_hidden, frozen=frozen)

    def tokens(self, x: Float[Tensor, "b c height width"]) -> tuple[Float[Tensor, "b n e"], tuple[int, int]]:
        """The class token and the patches behind the language model's block, and the size of the map."""
        tokens, size = super().tokens(x)
        return self.lm(tokens), size
