"""L2ViT: local window attention and enhanced linear attention of the whole map by turns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.davit import DaViTWindowAttention
from heedful.mixers.grid.local_concentration import LocalConcentration
from heedful.mixers.linear.l2vit import ReLULinearAttention
from heedful.models.backbone import head
from heedful.models.parts import DropPath, LayerNorm2d, Mlp, drop_path_rates, init_linear
from heedful.models.pyramid import Pyramid
from heedful.registry import register

CONFIGS = {
    "l2vit_tiny": {"parameters": 28_596_781, "flops": "4.7G", "arguments": {}},
    "l2vit_small": {"parameters": 50_199_157, "flops": "9.0G", "arguments": {"depths": (2, 2, 18, 2)}},
    "l2vit_base": {
        "parameters": 88_577_188,
        "flops": "15.9G",
        "arguments": {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "heads": (4, 8, 16, 32)},
    },
    "l2vit_base_384": {
        "parameters": 88_577_188,
        "flops": "47.5G",
        "size": 384,
        "arguments": {
            "depths": (2, 2, 18, 2),
            "dims": (128, 256, 512, 1024),
            "heads": (4, 8, 16, 32),
            "window": 12,
        },
    },
}


@register("l2vit-backbone", kind="model", paper="l2vit", tags=("image", "linear", "window"))
class L2ViT(Pyramid):
    """Image backbone whose blocks attend within windows and over the whole map in turn, windows first.

    Positions come from depthwise convolutions alone. A stem of two strided convolutions and a 2 x 2
    convolution with stride 2 before each further stage halve the map, padded with zeros (right, bottom)
    where they do not divide it.

    classes, in_channels, features_only  see `Backbone`
    depths     blocks of each stage
    dims       channels of each stage
    heads      of each stage
    window     side of the windows in tokens
    mlp_ratio  width of the MLP, in dims
    drop_path  rate of stochastic depth in the last block, growing from 0

    Source: L2ViT, arXiv 2501.16182.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (2, 1, 2, 1),
        "dims": (8, 8, 16, 16),
        "heads": (1, 1, 2, 2),
        "window": 4,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(4, depths=depths, dims=dims, heads=heads)
        self.channels, self.reductions = tuple(dims), (4, 8, 16, 32)
        self.downsample = nn.ModuleList([_stem(in_channels, dims[0])])
        self.downsample.extend(
            nn.Sequential(LayerNorm2d(a), _Pad(2), nn.Conv2d(a, b, 2, stride=2)) for a, b in pairwise(dims)
        )
        self.stages = nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, dim in enumerate(dims):
            blocks = nn.Sequential()
            for i, rate in enumerate(rates[stage]):
                hidden = int(mlp_ratio * dim)
                blocks.append(
                    GlobalBlock(dim, heads[stage], hidden, rate)
                    if i % 2
                    else WindowBlock(dim, heads[stage], window, hidden, rate)
                )
            self.stages.append(blocks)
        if not features_only:
            self.norm = nn.LayerNorm(dims[-1])
            self.head = head(dims[-1], classes)
        self.apply(init_linear)

    def pool(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c"]:
        return self.norm(last.flatten(2).transpose(1, 2)).mean(1)


class WindowBlock(nn.Module):
    """x += DWConv(x);  x += window_attention(LN(x));  x += DWConv(x);  x += mlp(LN(x)), DWConv 3 x 3."""

    def __init__(self, dim: int, heads: int, window: int, hidden: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.positions = nn.ModuleList([_positions(dim), _positions(dim)])
        self.norm1, self.norm2 = LayerNorm2d(dim), nn.LayerNorm(dim)
        self.mixer = DaViTWindowAttention(dim, heads=heads, window=window)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.positions[0](x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        x = x + self.positions[1](x)
        return x + self.drop_path(self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1))


class GlobalBlock(nn.Module):
    """x += DWConv(x);  x += linear_attention(LN(x));  x += local_concentration(LN(x));  x += mlp(LN(x))."""

    def __init__(self, dim: int, heads: int, hidden: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.positions = nn.ModuleList([_positions(dim)])
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm3 = LayerNorm2d(dim)
        self.mixer = ReLULinearAttention(dim, heads=heads)
        self.local = LocalConcentration(dim)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.positions[0](x)
        y = self.mixer(self.norm1(x.flatten(2).transpose(1, 2)))
        x = x + self.drop_path(y.transpose(1, 2).unflatten(2, x.shape[2:]))
        x = x + self.drop_path(self.local(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1))


class _Pad(nn.Module):
    """Zeros at the right and the bottom, up to the next multiple."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c padded more"]:
        return F.pad(x, (0, -x.shape[3] % self.multiple, 0, -x.shape[2] % self.multiple))


def _positions(dim: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


def _stem(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        _Pad(4),
        nn.Conv2d(dim, out // 2, 3, stride=2, padding=1),
        nn.BatchNorm2d(out // 2),
        nn.ReLU(),
        nn.Conv2d(out // 2, out, 3, stride=2, padding=1),
        nn.BatchNorm2d(out),
        LayerNorm2d(out),
    )
