"""GC ViT: four stages that alternate windows with their own queries and windows with those of the map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.gcvit import (
    FusedConv,
    GCViTWindowAttention,
    GlobalQueryGenerator,
    GlobalQueryWindowAttention,
)
from heedful.models.backbone import head
from heedful.models.parts import DropPath, LayerNorm2d, LayerScale, Mlp, drop_path_rates
from heedful.models.pyramid import Pyramid
from heedful.registry import register

# The multiply-adds published for xtiny, tiny2 and small2 leave out the products of attention (without them
# 2.68, 5.50 and 10.7 G, with them 2.91, 6.18 and 11.5 G); those published for the others hold them.
CONFIGS = {
    "gcvit_xxtiny": {"parameters": 11_995_428, "flops": "2.1G", "arguments": {"depths": (2, 2, 6, 2)}},
    "gcvit_xtiny": {"parameters": 19_981_294, "flops": "2.6G", "arguments": {"depths": (3, 4, 6, 5)}},
    "gcvit_tiny": {"parameters": 28_221_974, "flops": "4.7G", "arguments": {}},
    "gcvit_tiny2": {"parameters": 34_535_654, "flops": "5.5G", "arguments": {"depths": (3, 4, 29, 5)}},
    "gcvit_small": {
        "parameters": 51_092_173,
        "flops": "8.5G",
        "arguments": {"dim": 96, "heads": (3, 6, 12, 24), "mlp_ratio": 2, "layer_scale": 1e-5},
    },
    "gcvit_small2": {
        "parameters": 68_615_197,
        "flops": "10.7G",
        "arguments": {
            "depths": (3, 4, 23, 5),
            "dim": 96,
            "heads": (3, 6, 12, 24),
            "layer_scale": 1e-5,
        },
    },
    "gcvit_base": {
        "parameters": 90_320_836,
        "flops": "14.8G",
        "arguments": {"dim": 128, "heads": (4, 8, 16, 32), "mlp_ratio": 2, "layer_scale": 1e-5},
    },
    "gcvit_large": {
        "parameters": 202_075_570,
        "flops": "32.6G",
        "arguments": {"dim": 192, "heads": (6, 12, 24, 48), "mlp_ratio": 2, "layer_scale": 1e-5},
    },
}

POOLS = (3, 2, 0, 0)  # how often the generator of each stage halves the map


@register("gcvit-backbone", kind="model", paper="gcvit", tags=("image", "window", "global"))
class GCViT(Pyramid):
    """Image backbone whose windows, in every second block, answer queries made from the whole map.

        block:  x += gamma1 attention(LN(x));   x += gamma2 mlp(LN(x))

    Once a stage a small network makes the queries from the stage's input. Stages are joined by a residual
    convolution and a strided one, between layer norms. The last map goes through a layer norm and a mean to
    the head.

    classes, in_channels, features_only  see `Backbone`
    depths       blocks of each stage; the first has queries of its own, the second those of the map, ...
    dim          channels of the first stage; they double from stage to stage
    heads        heads of each stage, divisors of its channels
    windows      side of a window in tokens, in each stage; at 384 pixels (12, 12, 24, 12)
    mlp_ratio    width of the MLP, in channels
    layer_scale  where the gammas start; None: no gammas
    drop_path    rate of stochastic depth in the last block, growing from 0

    Source: GC ViT, arXiv 2206.09959.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (2, 2, 2, 2),
        "dim": 4,
        "heads": (1, 2, 2, 4),
        "windows": (2, 2, 3, 2),
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (3, 4, 19, 5),
        dim: int = 64,
        heads: Sequence[int] = (2, 4, 8, 16),
        windows: Sequence[int] = (7, 7, 14, 7),
        mlp_ratio: float = 3,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(len(POOLS), depths=depths, heads=heads, windows=windows)
        self.channels, self.reductions = tuple(dim * 2**stage for stage in range(4)), (4, 8, 16, 32)
        self.stem = nn.Conv2d(in_channels, dim, 3, stride=2, padding=1)
        self.downsample, self.stages = nn.ModuleList([Reduce(dim, dim)]), nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, width in enumerate(self.channels):
            if stage:
                self.downsample.append(Reduce(width // 2, width))
            self.stages.append(
                Stage(
                    width,
                    heads=heads[stage],
                    window=windows[stage],
                    pools=POOLS[stage],
                    hidden=int(mlp_ratio * width),
                    layer_scale=layer_scale,
                    drop_path=rates[stage],
                )
            )
        if not features_only:
            self.norm = LayerNorm2d(self.channels[-1])
            self.head = head(self.channels[-1], classes)
        self.apply(_init)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        # Channels last: tokens are then views of maps.
        return super().features(self.stem(x.contiguous(memory_format=torch.channels_last)))


class Stage(nn.Module):
    """Blocks of one width; every second one has the queries made from the stage's input."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        window: int,
        pools: int,
        hidden: int,
        layer_scale: float | None,
        drop_path: Sequence[float],
    ) -> None:
        super().__init__()
        self.generator = GlobalQueryGenerator(dim, window=window, pools=pools)
        self.blocks = nn.ModuleList()
        for number, rate in enumerate(drop_path):
            kind = GlobalQueryWindowAttention if number % 2 else GCViTWindowAttention
            self.blocks.append(Block(dim, kind(dim, heads=heads, window=window), hidden, layer_scale, rate))

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        query = self.generator(x)
        for number, block in enumerate(self.blocks):
            x = block(x, query=query) if number % 2 else block(x)
        return x


class Block(nn.Module):
    """A mixer of maps and an MLP; what is given beside x goes to the mixer."""

    def __init__(
        self, dim: int, mixer: nn.Module, hidden: int, layer_scale: float | None, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, init=layer_scale)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, init=layer_scale, axis=-1)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "b c height width"], **given: Tensor
    ) -> Float[Tensor, "b c height width"]:
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), **given)))
        y = self.scale2(self.mlp(self.norm2(x.movedim(1, -1))))
        return x + self.drop_path(y.movedim(-1, 1))


class Reduce(nn.Module):
    """Half the map: LN(Conv3x3(x + FusedConv(x))) of x = LN(input)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim)
        self.conv = FusedConv(dim)
        self.reduction = nn.Conv2d(dim, out, 3, stride=2, padding=1, bias=False)
        self.norm2 = LayerNorm2d(out)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c2 height2 width2"]:
        x = self.norm1(x)
        return self.norm2(self.reduction(x + self.conv(x)))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
