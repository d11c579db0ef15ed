"""MSVMamba: four stages of multi-scale scans, each followed by an MLP with a convolution inside."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.scan.msvmamba import MultiScaleScan2d
from heedful.models.backbone import head
from heedful.models.parts import DropPath, LayerNorm2d, ResidualConvMlp, drop_path_rates, init_linear
from heedful.models.pyramid import Pyramid
from heedful.registry import register

# The published multiply-adds hold 5 a normed number, 10 a step of the scans and 4 an interpolated number;
# products and convolutions alone, as counted here, are 0.844, 1.48 and 4.51 G.
CONFIGS = {
    "msvmamba_nano": {"parameters": 6_864_136, "flops": "0.88G", "arguments": {"dims": (48, 96, 192, 384)}},
    "msvmamba_micro": {
        "parameters": 11_879_272,
        "flops": "1.53G",
        "arguments": {"dims": (64, 128, 256, 512)},
    },
    "msvmamba_tiny": {"parameters": 33_046_312, "flops": "4.61G", "arguments": {"depths": (1, 2, 9, 2)}},
}


@register("msvmamba-backbone", kind="model", paper="msvmamba", tags=("image", "state space", "multi-scale"))
class MSVMamba(Pyramid):
    """Image backbone whose tokens meet by scans, one at full and three at half resolution.

        block:  x += scan(LN(x));   x += mlp(LN(x))
        mlp:    W2 gelu(h + DWConv3x3(h)),  h = W1 x

    A 4 x 4 convolution with stride 4 makes the first map; before each further stage 2 x 2 tokens become one,
    the map padded with zeros (right, bottom) where a side is odd. A norm and a mean lead to the head.

    classes, in_channels, features_only  see `Backbone`
    depths     blocks of each stage
    dims       channels of each stage
    state_dim  numbers of state a channel of a scan
    mlp_ratio  width of the MLP, in dims
    drop_path  rate of stochastic depth in the last block, growing from 0

    Source: MSVMamba, arXiv 2405.14174.
    """

    example: ClassVar[dict[str, Any]] = {"classes": 10, "depths": (1, 1, 1, 1), "dims": (16, 16, 24, 32)}

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (1, 2, 5, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        state_dim: int = 1,
        mlp_ratio: float = 2,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(4, depths=depths, dims=dims)
        self.channels, self.reductions = tuple(dims), (4, 8, 16, 32)
        stem = nn.Sequential(nn.Conv2d(in_channels, dims[0], 4, stride=4), LayerNorm2d(dims[0]))
        self.downsample = nn.ModuleList([stem])
        self.downsample.extend(Merge(a, b) for a, b in pairwise(dims))
        rates = drop_path_rates(depths, drop_path)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, state_dim, int(mlp_ratio * dim), rate) for rate in rates[stage]))
            for stage, dim in enumerate(dims)
        )
        if not features_only:
            self.norm = LayerNorm2d(dims[-1])
            self.head = head(dims[-1], classes)
        self.apply(init_linear)


class Block(nn.Module):
    """A scan and an MLP, each behind a norm."""

    def __init__(self, dim: int, state_dim: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim)
        self.mixer = MultiScaleScan2d(dim, state_dim=state_dim)
        self.norm2 = LayerNorm2d(dim)
        self.mlp = ConvFeedForward(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvFeedForward(ResidualConvMlp):
    """fc2(act(h + DWConv3x3(h))), h = fc1(x): the activation comes behind the convolution."""

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        hidden = self.fc1(x)
        return self.fc2(self.act(hidden + self.dwconv(hidden)))


class Merge(nn.Module):
    """The 2 x 2 tokens of a square, column by column, become one: W LN([x00, x10, x01, x11])."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e h w"]:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        x = torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=1)
        return self.reduction(self.norm(x.movedim(1, -1))).movedim(-1, 1)
