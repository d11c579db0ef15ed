"""HaloNet: a residual network whose 3 x 3 convolutions are attention of blocks with a halo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.halonet import HaloAttention
from heedful.models.backbone import Backbone, head
from heedful.models.parts import ConvNorm, DropPath, drop_path_rates
from heedful.registry import register

# No code of the authors gives exact counts of parameters; these round to the published 5.5M, 8.1M, 9.4M,
# 11.8M, 19.1M, 30.7M, 43.4M and 67.4M. With 8 heads in every stage H1 has the 8,100,056 of timm's.
CONFIGS = {
    "halonet_h0": {
        "parameters": 5_502_248,
        "size": 256,
        "arguments": {"depths": (3, 3, 7, 3), "out_ratio": 0.5},
    },
    "halonet_h1": {"parameters": 8_101_352, "size": 256, "arguments": {}},
    "halonet_h2": {
        "parameters": 9_405_608,
        "size": 256,
        "arguments": {"depths": (3, 3, 11, 3), "out_ratio": 1.25},
    },
    "halonet_h3": {
        "parameters": 11_842_792,
        "size": 320,
        "arguments": {"depths": (3, 3, 12, 3), "block_size": 10, "out_ratio": 1.5, "final": 1024},
    },
    "halonet_h4": {
        "parameters": 19_103_464,
        "size": 384,
        "arguments": {
            "depths": (3, 3, 12, 3),
            "block_size": 12,
            "halo_size": 2,
            "out_ratio": 3,
            "final": 1280,
        },
    },
    "halonet_h5": {
        "parameters": 30_718_952,
        "size": 448,
        "arguments": {
            "depths": (3, 3, 23, 3),
            "block_size": 14,
            "halo_size": 2,
            "value_ratio": 2.5,
            "out_ratio": 2,
            "final": 1536,
        },
    },
    "halonet_h6": {
        "parameters": 43_458_280,
        "size": 512,
        "arguments": {
            "depths": (3, 3, 24, 3),
            "halo_size": 4,
            "value_ratio": 3,
            "out_ratio": 2.75,
            "final": 1536,
        },
    },
    "halonet_h7": {
        "parameters": 67_434_728,
        "size": 600,
        "arguments": {
            "depths": (3, 3, 26, 3),
            "block_size": 10,
            "value_ratio": 4,
            "out_ratio": 3.5,
            "final": 2048,
        },
    },
}


@register("halonet-backbone", kind="model", paper="halonet", tags=("image", "local"))
class HaloNet(Backbone):
    """Image backbone of residual blocks around local attention.

        block:  x = relu(shortcut(x) + BN(Conv(relu(BN(attention(relu(BN(Conv(x)))))))))

    The convolutions are 1 x 1; the first attention of each stage but the first has stride 2. The stem is a
    strided convolution and a pool. A last convolution may stand before the mean.

    classes, in_channels, features_only  see `Backbone`
    depths       blocks of each stage
    dims         inner channels of each stage, also those of queries and keys
    heads        heads of each stage
    block_size   side of a block of queries, in pixels of the map
    halo_size    margin of its window
    value_ratio  channels of values, in dims
    out_ratio    channels of the map between blocks, in dims
    final        channels of the last convolution, or None
    drop_path    rate of stochastic depth in the last block, growing from 0

    Source: HaloNet, arXiv 2103.12731, with the blocks of timm.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1, 1),
        "dims": (8, 8, 16, 16),
        "heads": (2, 2, 4, 4),
        "block_size": 4,
        "halo_size": 1,
        "final": 24,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (3, 3, 10, 3),
        dims: Sequence[int] = (64, 128, 256, 512),
        heads: Sequence[int] = (4, 8, 8, 8),
        block_size: int = 8,
        halo_size: int = 3,
        value_ratio: float = 1,
        out_ratio: float = 1,
        final: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(len(dims), depths=depths, heads=heads)
        self.channels = tuple(int(dim * out_ratio) for dim in dims)
        self.reductions = tuple(4 * 2**stage for stage in range(len(dims)))
        self.final_width = final
        before = 64
        self.stem = nn.Sequential(
            ConvNorm(in_channels, before, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)
        )
        self.stages = nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, (dim, out) in enumerate(zip(dims, self.channels, strict=True)):
            blocks = nn.Sequential()
            for number, rate in enumerate(rates[stage]):
                stride = 2 if stage and not number else 1
                mixer = HaloAttention(
                    dim,
                    dim_out=int(dim * value_ratio),
                    heads=heads[stage],
                    head_dim=dim // heads[stage],
                    block_size=block_size,
                    halo_size=halo_size,
                    stride=stride,
                )
                blocks.append(Block(before, out, mixer, stride=stride, drop_path=rate))
                before = out
            self.stages.append(blocks)
        if not features_only:
            self.final = nn.Identity() if final is None else nn.Sequential(ConvNorm(before, final), nn.ReLU())
            self.head = head(self.width, classes)

    @property
    def width(self) -> int:
        return self.channels[-1] if self.final_width is None else self.final_width

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def pool(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c2"]:
        return self.final(last).mean((2, 3))


class Block(nn.Module):
    """Attention between two 1 x 1 convolutions, and a shortcut."""

    def __init__(
        self, dim: int, out: int, mixer: HaloAttention, *, stride: int, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, mixer.dim)
        self.mixer = mixer
        self.norm = nn.BatchNorm2d(mixer.dim_out)
        self.conv2 = ConvNorm(mixer.dim_out, out)
        self.shortcut = nn.Identity() if dim == out and stride == 1 else ConvNorm(dim, out, stride=stride)
        self.act = nn.ReLU()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c2 height2 width2"]:
        y = self.act(self.norm(self.mixer(self.act(self.conv1(x)))))
        return self.act(self.shortcut(x) + self.drop_path(self.conv2(y)))
