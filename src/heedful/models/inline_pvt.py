"""InLine-PVT: the pyramid of PVT with injective linear attention in every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from heedful.checks import check_stages
from heedful.mixers.grid.inline_attention import InLineAttention
from heedful.models.pvt import PVT
from heedful.registry import register

CONFIGS = {
    "inline_pvt_tiny": {"parameters": 12_032_232, "flops": "2.0G", "arguments": {}},
    "inline_pvt_small": {"parameters": 21_556_136, "flops": "3.9G", "arguments": {"depths": (3, 4, 6, 3)}},
    "inline_pvt_medium": {"parameters": 37_618_856, "flops": "6.9G", "arguments": {"depths": (3, 4, 18, 3)}},
    "inline_pvt_large": {"parameters": 51_154_280, "flops": "10.2G", "arguments": {"depths": (3, 8, 27, 3)}},
}


@register("inline-pvt-backbone", kind="model", paper="inline-attention", tags=("image", "linear"))
class InLinePVT(PVT):
    """Image backbone of four stages with injective linear attention.

    classes, in_channels, features_only  see `Backbone`
    depths, dims, mlp_ratios, image_size, drop_path  see `PVT`
    heads  of each stage

    Source: InLine, arXiv 2412.06590.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1, 1),
        "dims": (8, 8, 16, 16),
        "heads": (1, 1, 2, 2),
        "mlp_ratios": (2, 2, 2, 2),
        "image_size": 64,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 2, 2, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        heads: Sequence[int] = (2, 4, 10, 16),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        image_size: int = 224,
        drop_path: float = 0.0,
    ) -> None:
        check_stages(4, heads=heads)
        super().__init__(
            lambda stage, _: InLineAttention(dims[stage], heads=heads[stage]),
            classes=classes,
            in_channels=in_channels,
            features_only=features_only,
            depths=depths,
            dims=dims,
            mlp_ratios=mlp_ratios,
            image_size=image_size,
            drop_path=drop_path,
        )
