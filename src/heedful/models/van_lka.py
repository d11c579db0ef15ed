"""VAN: four stages of large kernel attention, batch norms inside and layer norms between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.van_lka import LargeKernelAttention
from heedful.models.backbone import Backbone, head
from heedful.models.metaformer_poolformer import MetaFormerBlock
from heedful.models.parts import LayerNorm2d, drop_path_rates
from heedful.registry import register

CONFIGS = {
    "van_b0": {
        "parameters": 4_105_800,
        "flops": "0.9G",
        "arguments": {"depths": (3, 3, 5, 2), "dims": (32, 64, 160, 256)},
    },
    "van_b1": {"parameters": 13_861_800, "flops": "2.5G", "arguments": {"depths": (2, 2, 4, 2)}},
    "van_b2": {"parameters": 26_578_472, "flops": "5.0G", "arguments": {"depths": (3, 3, 12, 3)}},
    "van_b3": {"parameters": 44_765_608, "flops": "9.0G", "arguments": {"depths": (3, 5, 27, 3)}},
    "van_b4": {"parameters": 60_283_176, "flops": "12.2G", "arguments": {"depths": (3, 6, 40, 3)}},
    "van_b5": {
        "parameters": 89_967_688,
        "flops": "17.2G",
        "arguments": {"depths": (3, 3, 24, 3), "dims": (96, 192, 480, 768)},
    },
    "van_b6": {
        "parameters": 199_829_416,
        "flops": "38.4G",
        "arguments": {"depths": (6, 6, 90, 6), "dims": (96, 192, 384, 768)},
    },
}


@register(
    "van-lka-backbone",
    kind="model",
    paper="van-lka",
    tags=("image", "convolution", "gate"),
    aliases=("van",),
)
class VAN(Backbone):
    """Image backbone whose mixer is large kernel attention between two 1 x 1 convolutions.

        block:  x += gamma1 attention(BN(x));   x += gamma2 mlp(BN(x))
        attention(z) = z + Conv(LKA(gelu(Conv(z))));   mlp(z) = Conv(gelu(DWConv3x3(Conv(z))))

    A strided convolution with a batch norm comes before each stage, a layer norm behind it.

    classes, in_channels, features_only  see `Backbone`
    depths      blocks of each stage
    dims        channels of each stage
    mlp_ratios  width of the MLPs of each stage, in dims
    norm_eps    of the layer norms; the released models have 1e-6
    drop_path   rate of stochastic depth in the last block, growing from 0

    Source: Visual Attention Network, arXiv 2202.09741.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1, 1),
        "dims": (8, 8, 16, 16),
        "mlp_ratios": (2, 2, 2, 2),
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(len(dims), depths=depths, mlp_ratios=mlp_ratios)
        self.channels, self.reductions = tuple(dims), tuple(4 * 2**stage for stage in range(len(dims)))
        self.downsample, self.stages, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        before = in_channels
        for stage, dim in enumerate(dims):
            kernel, stride = (3, 2) if stage else (7, 4)
            conv = nn.Conv2d(before, dim, kernel, stride=stride, padding=kernel // 2)
            self.downsample.append(nn.Sequential(conv, nn.BatchNorm2d(dim)))
            block = partial(MetaFormerBlock, dim, norm=nn.BatchNorm2d, layer_scale=1e-2)
            hidden = mlp_ratios[stage] * dim
            self.stages.append(
                nn.Sequential(
                    *(block(VANAttention(dim), VANMlp(dim, hidden), drop_path=r) for r in rates[stage])
                )
            )
            self.norms.append(LayerNorm2d(dim, eps=norm_eps))
            before = dim
        if not features_only:
            self.head = head(dims[-1], classes)
        self.apply(_init)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = []
        for downsample, stage, norm in zip(self.downsample, self.stages, self.norms, strict=True):
            x = norm(stage(downsample(x)))
            maps.append(x)
        return maps


class VANAttention(nn.Module):
    """Large kernel attention between two convolutions, with a residual of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.lka = LargeKernelAttention(dim)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        return x + self.proj_out(self.lka(self.act(self.proj_in(x))))


class VANMlp(nn.Sequential):
    """An MLP of channels with a depthwise convolution inside."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
