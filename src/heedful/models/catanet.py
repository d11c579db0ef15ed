"""CATANet: light image super-resolution by tokens of like content and overlapping patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_choice, check_map, check_positive
from heedful.mixers.grid.catanet import LocalRegionSelfAttention, TokenAggregationBlock
from heedful.models.parts import init_linear
from heedful.registry import Entry, register

CONFIGS = {
    "catanet_x2": {"parameters": 477_435, "arguments": {"scale": 2}},
    "catanet_x3": {"parameters": 549_635, "arguments": {"scale": 3}},
    "catanet_x4": {"parameters": 535_195, "arguments": {"scale": 4}},
}


@register("catanet", kind="model", paper="catanet", tags=("image", "restoration", "super-resolution"))
class CATANet(nn.Module):
    """A small image in, one `scale` times as large out.

        z = conv(x);   blocks: z += conv(patches(tokens(z)));   y = conv(enlarge(z + conv(x))) + bilinear(x)

    scale        2, 3 or 4
    in_channels  of the image, and of the result
    dim          channels inside
    heads, qk_dim, mlp_dim  of the attentions and their feed-forward nets
    centres, group_sizes, patch_sizes  of each block, equally many
    iterations, decay  of the centres in training

    Any size of image. Raises ValueError on another scale or sequences of different lengths.
    Source: CATANet, arXiv 2503.06896.
    """

    entry: ClassVar[Entry]
    example: ClassVar[dict[str, Any]] = {
        "scale": 2,
        "dim": 8,
        "heads": 2,
        "qk_dim": 8,
        "mlp_dim": 12,
        "centres": (4, 6),
        "group_sizes": (32, 16),
        "patch_sizes": (8, 10),
    }

    def __init__(
        self,
        *,
        scale: int = 4,
        in_channels: int = 3,
        dim: int = 40,
        heads: int = 4,
        qk_dim: int = 36,
        mlp_dim: int = 96,
        centres: Sequence[int] = (16, 32, 64, 128, 16, 32, 64, 128),
        group_sizes: Sequence[int] = (256, 128, 64, 32, 256, 128, 64, 32),
        patch_sizes: Sequence[int] = (16, 20, 24, 28, 16, 20, 24, 28),
        iterations: int = 5,
        decay: float = 0.999,
    ) -> None:
        super().__init__()
        check_choice("scale", scale, (2, 3, 4))
        check_positive("in_channels", in_channels)
        if not len(centres) == len(group_sizes) == len(patch_sizes):
            raise ValueError(f"centres is {tuple(centres)}, must be as long as group_sizes and patch_sizes")
        self.scale, self.in_channels = scale, in_channels
        self.first = nn.Conv2d(in_channels, dim, 3, padding=1)
        shared: dict[str, Any] = {"heads": heads, "qk_dim": qk_dim, "mlp_dim": mlp_dim}
        self.blocks = nn.ModuleList(
            nn.Sequential(
                TokenAggregationBlock(
                    dim, **shared, centres=count, group_size=size, iterations=iterations, decay=decay
                ),
                LocalRegionSelfAttention(dim, **shared, patch=patch),
                nn.Conv2d(dim, dim, 3, padding=1),
            )
            for count, size, patch in zip(centres, group_sizes, patch_sizes, strict=True)
        )
        steps = (2, 2) if scale == 4 else (scale,)
        self.enlarge = nn.Sequential()
        for step in steps:
            self.enlarge.extend(
                [nn.Conv2d(dim, dim * step**2, 3, padding=1), nn.PixelShuffle(step), nn.LeakyReLU(0.1)]
            )
        self.last = nn.Conv2d(dim, in_channels, 3, padding=1)
        self.apply(init_linear)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height2 width2"]:
        check_map("x", x, self.in_channels, (2,))
        shallow = z = self.first(x)
        for block in self.blocks:
            z = z + block(z)
        y = self.last(self.enlarge(z + shallow))
        return y + F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)

    def example_inputs(
        self, *, batch: int = 2, size: tuple[int, int] = (12, 14), dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(0)
        return {"x": torch.rand(batch, self.in_channels, *size, generator=generator).to(dtype)}
