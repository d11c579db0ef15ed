"""InLine-DeiT: DeiT with injective linear attention."""

from __future__ import annotations

from typing import Any, ClassVar

from heedful.mixers.grid.inline_attention import InLineAttentionDeiT
from heedful.models.deit import DeiT
from heedful.registry import register

CONFIGS = {
    "inline_deit_tiny": {"parameters": 6_477_736, "flops": "1.1G", "arguments": {}},
    "inline_deit_small": {
        "parameters": 16_734_760,
        "flops": "5.0G",
        "size": 288,
        "arguments": {"dim": 320, "heads": 10, "image_size": 288},
    },
    "inline_deit_base": {
        "parameters": 23_797_096,
        "flops": "17.2G",
        "size": 448,
        "arguments": {"dim": 384, "heads": 12, "image_size": 448},
    },
}


@register("inline-deit-backbone", kind="model", paper="inline-attention", tags=("image", "linear"))
class InLineDeiT(DeiT):
    """Vision transformer of patches that are mixed by injective linear attention in all blocks.

    classes, in_channels, features_only  see `Backbone`
    dim, depth, image_size, patch, mlp_ratio, drop_path  see `DeiT`
    heads  of each block

    Source: InLine, arXiv 2412.06590.
    """

    example: ClassVar[dict[str, Any]] = {"classes": 10, "dim": 16, "depth": 2, "heads": 2, "image_size": 48}

    exempt: ClassVar[dict[str, str]] = {
        "gradients": "the head sees the class token alone, which the convolution of the last block leaves out"
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        dim: int = 192,
        depth: int = 12,
        heads: int = 6,
        image_size: int = 224,
        patch: int = 16,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            lambda _: InLineAttentionDeiT(dim, heads=heads),
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
