"""TransNeXt: four stages of aggregated attention, the last one with attention of the whole map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.conv_glu import ConvGLU
from heedful.mixers.grid.transnext import AggregatedAttention, GlobalCosineAttention
from heedful.models.backbone import Backbone, head
from heedful.models.parts import DropPath, LayerNorm2d, drop_path_rates, init_linear
from heedful.registry import register

# The 2.7 G of micro hold 0.02 G of products with neighbours, which are made place by place of the window and
# not counted; without them it is 2.63 G. In the others they do not matter.
CONFIGS = {
    "transnext_micro": {"parameters": 12_809_304, "flops": "2.7G", "arguments": {}},
    "transnext_tiny": {
        "parameters": 28_258_960,
        "flops": "5.7G",
        "arguments": {"dims": (72, 144, 288, 576), "heads": (3, 6, 12, 24)},
    },
    "transnext_small": {
        "parameters": 49_741_564,
        "flops": "10.3G",
        "arguments": {"depths": (5, 5, 22, 5), "dims": (72, 144, 288, 576), "heads": (3, 6, 12, 24)},
    },
    "transnext_base": {
        "parameters": 89_721_496,
        "flops": "18.4G",
        "arguments": {"depths": (5, 5, 23, 5), "dims": (96, 192, 384, 768), "heads": (4, 8, 16, 32)},
    },
    "transnext_micro_aaaa": {
        "parameters": 13_114_008,
        "flops": "3.3G",
        "size": 256,
        "arguments": {"pool_ratios": (16, 8, 4, 2), "trained_size": 256},
    },
}


@register("transnext-backbone", kind="model", paper="transnext", tags=("image", "local", "pooled"))
class TransNeXt(Backbone):
    """Image backbone in which every place sees its neighbours sharply and the whole map coarsely.

        block:  x += attention(LN(x));   x += ConvGLU(LN(x))

    An overlapping strided convolution and a layer norm stand before each stage, a layer norm after it. A
    stage whose pool_ratio is 1 attends to the whole map.

    classes, in_channels, features_only  see `Backbone`
    depths        blocks of each stage
    dims          channels of each stage
    heads         heads of each stage; divisors of dims
    pool_ratios   places that a cell of the coarse map joins along a side, in each stage
    window        side of the window of neighbours
    mlp_ratios    width of the ordinary net that a ConvGLU stands for, in dims
    trained_size  side of the images trained on, which offsets are measured in; None: that of each image
    drop_path     rate of stochastic depth in the last block, growing from 0

    Source: TransNeXt, arXiv 2311.17132.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1, 1),
        "dims": (8, 8, 16, 16),
        "heads": (2, 2, 4, 4),
        "mlp_ratios": (2, 2, 2, 2),
        "trained_size": 64,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 2, 15, 2),
        dims: Sequence[int] = (48, 96, 192, 384),
        heads: Sequence[int] = (2, 4, 8, 16),
        pool_ratios: Sequence[int] = (8, 4, 2, 1),
        window: int = 3,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        trained_size: int | None = 224,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(len(dims), depths=depths, heads=heads, pool_ratios=pool_ratios, mlp_ratios=mlp_ratios)
        self.channels, self.reductions = tuple(dims), tuple(4 * 2**stage for stage in range(len(dims)))
        self.downsample, self.stages, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, dim in enumerate(dims):
            before = dims[stage - 1] if stage else in_channels
            self.downsample.append(Downsample(before, dim, first=not stage))
            side = None if trained_size is None else max(1, trained_size // self.reductions[stage])
            shared = {"heads": heads[stage], "trained_size": None if side is None else (side, side)}
            ratio, hidden = pool_ratios[stage], int(mlp_ratios[stage] * dim)
            blocks = nn.Sequential()
            for rate in rates[stage]:
                mixer = (
                    self.global_mixer(stage, dim, **shared)
                    if ratio == 1
                    else self.local_mixer(stage, dim, window=window, pool_ratio=ratio, **shared)
                )
                blocks.append(Block(dim, mixer, hidden, rate))
            self.stages.append(blocks)
            self.norms.append(LayerNorm2d(dim, eps=1e-6))
        self.apply(_init)
        if not features_only:
            self.head = head(dims[-1], classes)
            init_linear(self.head)

    def local_mixer(self, stage: int, dim: int, **how: Any) -> nn.Module:
        """The attention of a stage with a pooled map."""
        return AggregatedAttention(dim, **how)

    def global_mixer(self, stage: int, dim: int, **how: Any) -> nn.Module:
        """The attention of a stage without."""
        return GlobalCosineAttention(dim, **how)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = []
        x = x.contiguous(memory_format=torch.channels_last)  # so that tokens are views of maps
        for downsample, stage, norm in zip(self.downsample, self.stages, self.norms, strict=True):
            x = norm(stage(downsample(x)))
            maps.append(x)
        return maps


class Block(nn.Module):
    """A mixer of maps and a gated feed-forward net, each behind a norm."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = LayerNorm2d(dim, eps=1e-6)
        self.mlp = ConvGLU(dim, hidden=hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Downsample(nn.Sequential):
    """A strided convolution whose windows overlap, then a norm: a quarter of the side at first, else half."""

    def __init__(self, dim: int, out: int, *, first: bool) -> None:
        super().__init__()
        kernel, stride = (7, 4) if first else (3, 2)
        self.proj = nn.Conv2d(dim, out, kernel, stride=stride, padding=kernel // 2)
        self.norm = LayerNorm2d(out)


def _init(module: nn.Module) -> None:
    """The convolutions; the mixers start themselves as published."""
    if isinstance(module, ConvGLU):
        module.apply(init_linear)
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
