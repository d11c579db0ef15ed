"""DaViT: four stages that alternate attention in windows and attention between channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.davit import ChannelGroupAttention, DaViTWindowAttention
from heedful.models.backbone import head
from heedful.models.parts import DropPath, LayerNorm2d, Mlp, drop_path_rates
from heedful.models.pyramid import Pyramid
from heedful.registry import register

CONFIGS = {
    "davit_tiny": {"parameters": 28_360_168, "flops": "4.54G", "arguments": {}},
    "davit_small": {"parameters": 49_745_896, "flops": "8.80G", "arguments": {"depths": (1, 1, 9, 1)}},
    "davit_base": {
        "parameters": 87_954_408,
        "flops": "15.51G",
        "arguments": {"depths": (1, 1, 9, 1), "dims": (128, 256, 512, 1024), "heads": (4, 8, 16, 32)},
    },
    "davit_large_384": {
        "parameters": 196_811_752,
        "flops": "102.97G",
        "size": 384,
        "arguments": {
            "depths": (1, 1, 9, 1),
            "dims": (192, 384, 768, 1536),
            "heads": (6, 12, 24, 48),
            "window": 12,
        },
    },
    "davit_huge": {
        "parameters": 348_922_856,
        "arguments": {"depths": (1, 1, 9, 1), "dims": (256, 512, 1024, 2048), "heads": (8, 16, 32, 64)},
    },
    "davit_giant": {
        "parameters": 1_406_470_120,
        "arguments": {"depths": (1, 1, 12, 3), "dims": (384, 768, 1536, 3072), "heads": (12, 24, 48, 96)},
    },
}


@register("davit-backbone", kind="model", paper="davit", tags=("image", "window", "channel"))
class DaViT(Pyramid):
    """Image backbone of pairs of blocks: one attends in windows of tokens, one in groups of channels.

        block:  x += DWConv3x3(x);   x += attention(LN(x));   x += DWConv3x3(x);   x += mlp(LN(x))

    A strided convolution before each stage; a map of odd side is padded with zeros (right, bottom) there.
    The pooled vector goes through a layer norm to the head.

    classes, in_channels, features_only  see `Backbone`
    depths      pairs of blocks of each stage
    dims        channels of each stage
    heads       heads, and groups of channels, of each stage; divisors of dims
    window      side of a window in tokens
    mlp_ratio   width of the MLP, in dims
    scale_mode  of the attention between channels, see `ChannelGroupAttention`
    drop_path   rate of stochastic depth in the last block, growing from 0

    Source: DaViT, arXiv 2204.03645.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1, 1),
        "dims": (8, 8, 16, 16),
        "heads": (2, 2, 4, 4),
        "window": 3,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (1, 1, 3, 1),
        dims: Sequence[int] = (96, 192, 384, 768),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4,
        scale_mode: str = "head",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(len(dims), depths=depths, heads=heads)
        self.channels, self.reductions = tuple(dims), tuple(4 * 2**stage for stage in range(len(dims)))
        self.downsample, self.stages = nn.ModuleList(), nn.ModuleList()
        rates = drop_path_rates([2 * depth for depth in depths], drop_path)
        for stage, dim in enumerate(dims):
            self.downsample.append(Merge(dims[stage - 1], dim) if stage else Stem(in_channels, dim))
            pairs = nn.Sequential()
            for layer in range(depths[stage]):
                local = DaViTWindowAttention(dim, heads=heads[stage], window=window)
                channel = ChannelGroupAttention(dim, heads=heads[stage], scale_mode=scale_mode)
                pairs.append(
                    nn.Sequential(
                        *(
                            Block(dim, mixer, int(mlp_ratio * dim), rates[stage][2 * layer + which])
                            for which, mixer in enumerate((local, channel))
                        )
                    )
                )
            self.stages.append(pairs)
        if not features_only:
            self.norm = nn.LayerNorm(dims[-1])
            self.head = head(dims[-1], classes)
        self.apply(_init)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        # Channels last: tokens are then views of maps.
        return super().features(x.contiguous(memory_format=torch.channels_last))

    def pool(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c"]:
        return self.norm(last.mean((2, 3)))


class Block(nn.Module):
    """A mixer and an MLP, each after a convolution for positions."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.positions1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = LayerNorm2d(dim)
        self.mixer = mixer
        self.positions2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.positions1(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        x = x + self.positions2(x)
        return x + self.drop_path(self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1))


class Stem(nn.Sequential):
    """A quarter of the image's side: a convolution, then a norm."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, 7, stride=4, padding=3)
        self.norm = LayerNorm2d(out)


class Merge(nn.Module):
    """Half the map: a norm, then a convolution of squares of 2 x 2."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim)
        self.proj = nn.Conv2d(dim, out, 2, stride=2)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c2 height2 width2"]:
        return self.proj(F.pad(self.norm(x), (0, x.shape[3] % 2, 0, x.shape[2] % 2)))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
