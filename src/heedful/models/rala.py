"""RAVLT: two stages of rank-augmented linear attention, two of softmax attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.rala import RALAVanillaAttention, RankAugmentedLinearAttention
from heedful.models.backbone import head
from heedful.models.parts import DropPath, LayerNorm2d, LayerScale, ResidualConvMlp, drop_path_rates
from heedful.models.pyramid import Pyramid
from heedful.registry import register

# The published multiply-adds are within 2 % of those of the convolutions and norms (2.42, 4.53, 9.84 and
# 16.1 G); the products of attention, counted here as everywhere, make 2.61, 4.88, 10.6 and 17.2 G.
CONFIGS = {
    "ravlt_tiny": {"parameters": 14_897_768, "flops": "2.4G", "arguments": {}},
    "ravlt_small": {
        "parameters": 25_591_208,
        "flops": "4.6G",
        "arguments": {"depths": (3, 5, 9, 3), "dims": (64, 128, 320, 512), "heads": (1, 2, 5, 8)},
    },
    "ravlt_base": {
        "parameters": 48_241_288,
        "flops": "9.9G",
        "arguments": {
            "depths": (4, 6, 12, 6),
            "dims": (96, 192, 384, 512),
            "heads": (1, 2, 6, 8),
            "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
        },
    },
    "ravlt_large": {
        "parameters": 95_242_440,
        "flops": "16.0G",
        "arguments": {
            "depths": (4, 7, 19, 8),
            "dims": (96, 192, 448, 640),
            "heads": (1, 2, 7, 10),
            "layer_scale": (1e-6, 1e-6, 1e-6, 1e-6),
        },
    },
}


@register("rala-backbone", kind="model", paper="rala", tags=("image", "linear"))
class RAVLT(Pyramid):
    """Image backbone with linear attention in its two wide stages and softmax attention in the two late ones.

        block:  x += DWConv3x3(x);   x += g1 attention(LN(x));   x += g2 mlp(LN(x))
        mlp:    W2 (h + DWConv3x3(h)),  h = gelu(W1 x)

    A stem of four convolutions and a strided convolution before each further stage halve the map; a
    projection with batch norm and SiLU stands before the mean that the head sees.

    classes, in_channels, features_only  see `Backbone`
    depths       blocks of each stage
    dims         channels of each stage
    heads        of each stage; a head has a multiple of 4 channels
    mlp_ratio    width of the MLP, in dims
    projection   width of what the head sees
    layer_scale  first value of g1 and g2 in each stage
    drop_path    rate of stochastic depth in the last block, growing from 0

    Source: RALA, arXiv 2411.07635.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1, 1),
        "dims": (8, 8, 16, 16),
        "heads": (1, 1, 2, 2),
        "projection": 24,
    }
    linear: ClassVar[type[RankAugmentedLinearAttention]] = RankAugmentedLinearAttention

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: float = 3.5,
        projection: int = 1024,
        layer_scale: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(4, depths=depths, dims=dims, heads=heads, layer_scale=layer_scale)
        self.channels, self.reductions = tuple(dims), (4, 8, 16, 32)
        self.projection = projection
        self.downsample = nn.ModuleList([_stem(in_channels, dims[0])])
        self.downsample.extend(nn.Sequential(*_conv(a, b, 2)) for a, b in pairwise(dims))
        self.stages = nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, dim in enumerate(dims):
            kind = self.linear if stage < 2 else RALAVanillaAttention
            hidden, scale = int(mlp_ratio * dim), layer_scale[stage]
            self.stages.append(
                nn.Sequential(
                    *(Block(dim, kind(dim, heads=heads[stage]), hidden, scale, r) for r in rates[stage])
                )
            )
        if not features_only:
            self.proj = nn.Conv2d(dims[-1], projection, 1)
            self.norm = nn.BatchNorm2d(projection)
            self.head = head(projection, classes)

    @property
    def width(self) -> int:
        return self.projection

    def pool(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e"]:
        return F.silu(self.norm(self.proj(last))).mean((2, 3))


class Block(nn.Module):
    """A convolution for positions, a mixer and an MLP with a convolution inside, both scaled by channel."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.positions = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = LayerNorm2d(dim, eps=1e-6)
        self.mixer = mixer
        self.scale1 = LayerScale(dim, init=layer_scale)
        self.norm2 = LayerNorm2d(dim, eps=1e-6)
        self.mlp = ResidualConvMlp(dim, hidden)
        self.scale2 = LayerScale(dim, init=layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.positions(x)
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


def _conv(dim: int, out: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(dim, out, 3, stride=stride, padding=1), nn.BatchNorm2d(out)


def _stem(dim: int, out: int) -> nn.Sequential:
    """Four convolutions that leave a quarter of each side."""
    half = out // 2
    layers: list[nn.Module] = []
    for stride, width in ((2, half), (1, half), (1, half)):
        layers += [*_conv(dim, width, stride), nn.GELU()]
        dim = width
    return nn.Sequential(*layers, *_conv(half, out, 2))
