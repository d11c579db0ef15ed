"""MambaOut: four stages of gated CNN blocks, and an MLP for a head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.mambaout import GatedCNN
from heedful.models.backbone import Backbone, head
from heedful.models.parts import DropPath, drop_path_rates
from heedful.registry import register

CONFIGS = {
    # Published with 5 a normed number, which makes 1.16 G; without norms, as counted here, it is 1.148 G.
    "mambaout_femto": {"parameters": 7_304_536, "flops": "1.2G", "arguments": {"dims": (48, 96, 192, 288)}},
    "mambaout_kobe": {
        "parameters": 9_141_208,
        "flops": "1.5G",
        "arguments": {"depths": (3, 3, 15, 3), "dims": (48, 96, 192, 288)},
    },
    "mambaout_tiny": {"parameters": 26_545_096, "flops": "4.5G", "arguments": {}},
    "mambaout_small": {"parameters": 48_488_072, "flops": "9.0G", "arguments": {"depths": (3, 4, 27, 3)}},
    "mambaout_base": {
        "parameters": 84_813_092,
        "flops": "15.8G",
        "arguments": {"depths": (3, 4, 27, 3), "dims": (128, 256, 512, 768)},
    },
}


@register("mambaout-backbone", kind="model", paper="mambaout", tags=("image", "convolution", "gate"))
class MambaOut(Backbone):
    """Image backbone of gated CNN blocks, x += gated_cnn(x), without attention, scans or further MLPs.

    A stem of two strided convolutions and a strided convolution before each further stage halve the map,
    each followed by a norm of the channels. The mean of the last map goes through a norm and a hidden layer
    of 4 times its width, gelu and norm again to the head.

    classes, in_channels, features_only  see `Backbone`
    depths      blocks of each stage
    dims        channels of each stage
    expansion   hidden channels of a block, in dims
    kernel      side of the convolutions in the blocks
    conv_ratio  channels that are convolved, in dims
    drop_path   rate of stochastic depth in the last block, growing from 0

    Source: MambaOut, arXiv 2405.07992.
    """

    example: ClassVar[dict[str, Any]] = {"classes": 10, "depths": (1, 1, 1, 1), "dims": (8, 8, 12, 16)}

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 576),
        expansion: float = 8 / 3,
        kernel: int = 7,
        conv_ratio: float = 1.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(4, depths=depths, dims=dims)
        self.channels, self.reductions = tuple(dims), (4, 8, 16, 32)
        half = dims[0] // 2
        stem = nn.Sequential(_Halve(in_channels, half), nn.GELU(), _Halve(half, dims[0]))
        self.downsample = nn.ModuleList([stem])
        self.downsample.extend(_Halve(a, b) for a, b in pairwise(dims))
        self.stages = nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, dim in enumerate(dims):
            blocks = nn.Sequential()
            for rate in rates[stage]:
                mixer = GatedCNN(dim, expansion=expansion, kernel=kernel, conv_ratio=conv_ratio)
                blocks.append(Block(mixer, rate))
            self.stages.append(blocks)
        if not features_only:
            self.norm1 = nn.LayerNorm(dims[-1], eps=1e-6)
            self.hidden = nn.Linear(dims[-1], self.width)
            self.norm2 = nn.LayerNorm(self.width, eps=1e-6)
            self.head = head(self.width, classes)
        self.apply(_init)

    @property
    def width(self) -> int:
        return 4 * self.channels[-1]

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = []
        x = x.movedim(1, -1)
        for downsample, stage in zip(self.downsample, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x.movedim(-1, 1))
        return maps

    def pool(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e"]:
        return self.norm2(F.gelu(self.hidden(self.mean(last))))

    def mean(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c"]:
        """The normalised mean of the last map, before the hidden layer."""
        return self.norm1(last.mean((2, 3)))


class Block(nn.Module):
    """x += gated_cnn(x), channels last."""

    def __init__(self, mixer: GatedCNN, drop_path: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b height width c"]) -> Float[Tensor, "b height width c"]:
        return x + self.drop_path(self.mixer.mix(x))


class _Halve(nn.Module):
    """A strided convolution and a norm, channels last."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out, eps=1e-6)

    def forward(self, x: Float[Tensor, "b height width c"]) -> Float[Tensor, "b h w e"]:
        return self.norm(self.conv(x.movedim(-1, 1)).movedim(1, -1))


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
