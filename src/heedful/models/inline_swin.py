"""InLine-Swin: Swin with injective linear attention of the whole map in its first blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from heedful.checks import check_stages
from heedful.mixers.grid.inline_attention import InLineAttention
from heedful.models.swin import ShiftedWindowAttention, Swin
from heedful.registry import register

CONFIGS = {
    "inline_swin_tiny": {"parameters": 29_223_544, "flops": "4.5G", "arguments": {}},
    "inline_swin_small": {
        "parameters": 49_793_296,
        "flops": "8.7G",
        "arguments": {"depths": (2, 2, 18, 2), "linear_layers": (2, 2, 0, 0)},
    },
    "inline_swin_base": {
        "parameters": 88_350_120,
        "flops": "15.4G",
        "arguments": {
            "depths": (2, 2, 18, 2),
            "dims": (128, 256, 512, 1024),
            "heads": (4, 8, 16, 32),
            "linear_layers": (2, 2, 2, 0),
        },
    },
}


@register("inline-swin-backbone", kind="model", paper="inline-attention", tags=("image", "linear", "window"))
class InLineSwin(Swin):
    """Image backbone of four stages: injective linear attention first, shifted windows in the other blocks.

    classes, in_channels, features_only  see `Backbone`
    depths, dims, image_size, mlp_ratio, drop_path  see `Swin`
    heads          of each stage
    linear_layers  blocks of each stage with injective linear attention, which come first
    window         side of the windows of the others in tokens; every second of these is shifted by half

    Source: InLine, arXiv 2412.06590.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 3, 1),
        "dims": (8, 8, 16, 16),
        "heads": (1, 1, 2, 2),
        "linear_layers": (1, 1, 1, 0),
        "window": 3,
        "image_size": 64,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        heads: Sequence[int] = (3, 6, 12, 24),
        linear_layers: Sequence[int] = (2, 2, 6, 0),
        window: int = 7,
        image_size: int = 224,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
    ) -> None:
        def mixer(stage: int, layer: int, side: int) -> nn.Module:
            if layer < linear_layers[stage]:
                return InLineAttention(dims[stage], heads=heads[stage])
            return ShiftedWindowAttention(
                dims[stage], heads=heads[stage], window=min(window, side), shifted=layer % 2 == 1
            )

        check_stages(4, heads=heads, linear_layers=linear_layers)
        super().__init__(
            mixer,
            classes=classes,
            in_channels=in_channels,
            features_only=features_only,
            depths=depths,
            dims=dims,
            image_size=image_size,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
        )
