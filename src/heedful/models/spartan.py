"""SpaRTAN: four stages of spatial and channel mixers, a small convolutional network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.spartan import MultiOrderSpatialMixer, WaveChannelMixer, conv_norm_act
from heedful.models.backbone import Backbone, head
from heedful.models.parts import ConvNorm, DropPath
from heedful.registry import register

CONFIGS = {
    "spartan": {
        "parameters": 3_820_296,
        "flops": "1.0G",
        "size": 256,
        "arguments": {"depths": (3, 3, 12, 2), "dims": (32, 64, 128, 256), "expand": (4, 4, 2, 2)},
    },
}


@register("spartan-backbone", kind="model", paper="spartan", tags=("image", "conv", "mobile"))
class SpaRTAN(Backbone):
    """Image backbone for devices, of gated convolutions and wave mixers.

        block:  x += s_1 smixer(GroupNorm(x));   x += s_2 cmixer(GroupNorm(x)),   one s a channel, from 1e-5

    In the first two stages the spatial mixers convolve densely and the channel mixers depthwise; after them
    it is the other way round.

    classes, in_channels, features_only  see `Backbone`
    depths     blocks of each stage
    dims       channels of each stage, multiples of 8
    expand     width of the channel mixers over dims, in each stage
    drop_path  rate of stochastic depth; block i of n gets drop_path i / n. The authors train with 0.1

    Source: SpaRTAN, arXiv 2507.10999.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1, 1),
        "dims": (64, 64, 72, 80),
        "expand": (2, 2, 2, 2),
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (3, 3, 12, 2),
        dims: Sequence[int] = (32, 64, 128, 256),
        expand: Sequence[int] = (4, 4, 2, 2),
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(len(dims), depths=depths, expand=expand)
        self.channels, self.reductions = tuple(dims), tuple(4 * 2**stage for stage in range(len(dims)))
        first = dims[0]
        self.stem = nn.Sequential(
            conv_norm_act(in_channels, first // 2, stride=2), conv_norm_act(first // 2, first, stride=2)
        )
        self.stages = nn.ModuleList()
        done = 0
        for stage, dim in enumerate(dims):
            parts: list[nn.Module] = []
            if stage:
                merging = ConvNorm(dims[stage - 1], dim, 2, stride=2, padding=0)
                merging.norm.eps = 1e-6
                parts += [merging, nn.SiLU()]
            for _ in range(depths[stage]):
                rate = drop_path * done / sum(depths)
                parts.append(Block(dim, expand=expand[stage], early=stage < 2, drop_path=rate))
                done += 1
            self.stages.append(nn.Sequential(*parts))
        if not features_only:
            self.head = head(dims[-1], classes)
        self.apply(_init)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Block(nn.Module):
    """The spatial and the channel mixer, each behind a norm, scaled and added."""

    def __init__(self, dim: int, *, expand: int, early: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, dim, eps=1e-6)
        self.smixer = MultiOrderSpatialMixer(dim, depthwise=not early)
        self.scale1 = nn.Parameter(torch.full((1, dim, 1, 1), 1e-5))
        self.norm2 = nn.GroupNorm(1, dim, eps=1e-6)
        self.cmixer = WaveChannelMixer(dim, expand=expand, depthwise=early)
        self.scale2 = nn.Parameter(torch.full((1, dim, 1, 1), 1e-5))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.drop_path(self.scale1 * self.smixer(self.norm1(x)))
        return x + self.drop_path(self.scale2 * self.cmixer(self.norm2(x)))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        with torch.no_grad():
            module.weight *= module.groups**0.5  # torch counts the outputs of all groups, the authors of one
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
