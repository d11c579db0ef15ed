"""InLine-CSwin: CSwin with injective linear attention of the whole map in its first stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.inline_attention import InLineAttentionCSwin
from heedful.models.cswin import CSwin, crossing
from heedful.registry import register

# Published as 25, 43 and 96 M, but the released code builds 20.6, 33.0 and 73.4 M: these counts.
CONFIGS = {
    "inline_cswin_tiny": {"parameters": 20_604_520, "flops": "4.3G", "arguments": {}},
    "inline_cswin_small": {
        "parameters": 33_032_872,
        "flops": "6.8G",
        "arguments": {"depths": (3, 6, 29, 2), "linear_layers": (3, 6, 0, 0)},
    },
    "inline_cswin_base": {
        "parameters": 73_413_640,
        "flops": "14.9G",
        "arguments": {
            "depths": (3, 6, 29, 2),
            "dims": (96, 192, 384, 768),
            "heads": (4, 8, 16, 32),
            "linear_layers": (3, 6, 0, 0),
        },
    },
}


@register("inline-cswin-backbone", kind="model", paper="inline-attention", tags=("image", "linear", "window"))
class InLineCSwin(CSwin):
    """Image backbone of four stages: injective linear attention first, crossing stripes in the other blocks.

    classes, in_channels, features_only  see `Backbone`
    depths, dims, image_size, mlp_ratio, drop_path  see `CSwin`
    heads          of each stage, even where there are stripes
    linear_layers  blocks of each stage with injective linear attention of the whole map, which come first
    stripes        width of the stripes of the others; the last stage has none, nor have maps that are one

    Source: InLine, arXiv 2412.06590.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 2, 1, 1),
        "dims": (8, 8, 16, 16),
        "heads": (2, 2, 2, 2),
        "linear_layers": (1, 1, 0, 0),
        "stripes": (1, 2, 3, 3),
        "image_size": 64,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 4, 18, 1),
        dims: Sequence[int] = (64, 128, 256, 512),
        heads: Sequence[int] = (2, 4, 8, 16),
        linear_layers: Sequence[int] = (2, 4, 0, 0),
        stripes: Sequence[int] = (1, 2, 7, 7),
        image_size: int = 224,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
    ) -> None:
        def attend(stage: int, layer: int, side: int) -> nn.Module:
            dim, own = dims[stage], heads[stage]
            if layer < linear_layers[stage]:
                return InLine(dim, heads=own)
            # The last stage has no stripes.
            stripe = stripes[stage] if stage < 3 else side
            return crossing(dim, heads=own, stripe=stripe, side=side)

        check_stages(4, heads=heads, linear_layers=linear_layers, stripes=stripes)
        super().__init__(
            attend,
            classes=classes,
            in_channels=in_channels,
            features_only=features_only,
            depths=depths,
            dims=dims,
            image_size=image_size,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
        )


class InLine(nn.Module):
    """The attention of a block whose convolution follows from the mean of the block's input."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.core = InLineAttentionCSwin(dim, heads=heads)

    def forward(
        self, qkv: Float[Tensor, "3 b c height width"], x: Float[Tensor, "b c height width"]
    ) -> Float[Tensor, "b c height width"]:
        return self.core(*qkv, x.mean((2, 3)))
