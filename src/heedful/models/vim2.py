"""ViM2: four stages of cross scans over the map and scans over the channels, fed by all features before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_positive, check_stages
from heedful.mixers.scan.mambamixer import SelectiveChannelMixer
from heedful.mixers.scan.selective_ssm import SelectiveSSM
from heedful.models.backbone import head
from heedful.models.mambamixer import WeightedEarlierFeatures
from heedful.models.msvmamba import Merge
from heedful.models.parts import DropPath, LayerNorm2d, drop_path_rates, init_linear
from heedful.models.pyramid import Pyramid
from heedful.ops.scan_orders import inverse_order, scan_routes
from heedful.registry import register


@register("vim2", kind="model", paper="mambamixer", tags=("image", "state space", "channels"))
class ViM2(Pyramid):
    """Image backbone whose tokens meet by cross scans, and its channels by scans over the channels.

        T_0 = C_0 = the map that enters the stage;   for l = 1, 2, ...
        t = sum_(i < l) alpha_li T_i + beta_li C_i,          T_l = t + along_map(LN(t))
        c = sum_(i <= l) theta_li T_i + sum_(i < l) gamma_li C_i,   C_l = c + along_channels(LN(c))

    and C of the last block leaves the stage. At first beta_(l, l-1) = theta_(l, l) = 1 and all others are 0:
    an ordinary chain with residuals. along_map is `CrossScanMixer`, along_channels is `PooledChannelMixer`,
    whose weights are for a declared number of tokens: for any size of the map, it is averaged to that number,
    and the result is interpolated back.

    A 4 x 4 convolution with stride 4 makes the first map; before each further stage 2 x 2 tokens become one,
    the map padded with zeros (right, bottom) where a side is odd. A norm and a mean lead to the head.

    classes, in_channels, features_only  see `Backbone`
    depths     blocks of each stage
    dims       channels of each stage
    sides      side of the map, in tokens, that the channel mixers of each stage see
    state_dim  numbers of state a channel of a scan
    expand     width inside the mixers, in dims and in sides^2
    drop_path  rate of stochastic depth in the last block, growing from 0

    A reimplementation: sizes, norms, residuals, the start of the weights and the averaging to `sides` are
    heedful's. Raises ValueError on sizes below 1 or lists of another length.
    Source: MambaMixer, arXiv 2403.19888.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 2, 1, 1),
        "dims": (8, 12, 16, 20),
        "sides": (4, 3, 3, 2),
        "state_dim": 2,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        sides: Sequence[int] = (14, 14, 14, 7),
        state_dim: int = 16,
        expand: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(4, depths=depths, dims=dims, sides=sides)
        for name, sizes in (("depths", depths), ("dims", dims), ("sides", sides)):
            for stage, size in enumerate(sizes):
                check_positive(f"{name}[{stage}]", size)
        self.channels, self.reductions = tuple(dims), (4, 8, 16, 32)
        stem = nn.Sequential(nn.Conv2d(in_channels, dims[0], 4, stride=4), LayerNorm2d(dims[0]))
        self.downsample = nn.ModuleList([stem])
        self.downsample.extend(Merge(a, b) for a, b in pairwise(dims))
        rates = drop_path_rates(depths, drop_path)
        self.stages = nn.ModuleList(
            Stage(dim, side, rate, state_dim=state_dim, expand=expand)
            for dim, side, rate in zip(dims, sides, rates, strict=True)
        )
        if not features_only:
            self.norm = LayerNorm2d(dims[-1])
            self.head = head(dims[-1], classes)
        self.apply(init_linear)


class Stage(nn.Module):
    """Blocks of a token mixer and a channel mixer, each fed by a weighted sum of all before in the stage."""

    def __init__(self, dim: int, side: int, rates: Sequence[float], *, state_dim: int, expand: int) -> None:
        super().__init__()
        how = {"state_dim": state_dim, "expand": expand}
        self.tokens = nn.ModuleList(Residual(dim, CrossScanMixer(dim, **how), rate) for rate in rates)
        self.channels = nn.ModuleList(
            Residual(dim, PooledChannelMixer(dim, side, **how), rate) for rate in rates
        )
        self.to_tokens, self.to_channels = nn.ModuleList(), nn.ModuleList()
        for number in range(1, len(rates) + 1):
            self.to_tokens.append(WeightedEarlierFeatures(number, number, start=(False, True)))
            self.to_channels.append(WeightedEarlierFeatures(number + 1, number, start=(True, False)))

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        tokens, channels = [x], [x]
        layers = (self.tokens, self.channels, self.to_tokens, self.to_channels)
        for token, channel, to_token, to_channel in zip(*layers, strict=True):
            tokens.append(token(to_token(tokens, channels)))
            channels.append(channel(to_channel(tokens, channels)))
        return channels[-1]


class Residual(nn.Module):
    """x + mixer(LN(x))."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        return x + self.drop_path(self.mixer(self.norm(x)))


class CrossScanMixer(nn.Module):
    """Tokens mixed by gated selective state spaces along four routes: rows, columns, both also backwards.

        g = silu(W_1 x),  u = silu(DWConv3x3(W_2 x)),   y = W_3 (g sum_r S6_r(u along route r))

    Each route has weights of its own. Sources: MambaMixer, arXiv 2403.19888; VMamba, arXiv 2401.10166.
    """

    def __init__(self, dim: int, *, state_dim: int, expand: int) -> None:
        super().__init__()
        check_positive("expand", expand)
        inner = expand * dim
        self.gate = nn.Linear(dim, inner, bias=False)
        self.enter = nn.Linear(dim, inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.ssm = SelectiveSSM(inner, routes=4, state_dim=state_dim, rank=math.ceil(dim / 16))
        self.out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x.movedim(1, -1)
        u = F.silu(self.conv(self.enter(x).movedim(-1, 1)))
        routes = scan_routes("raster", u.shape[2:]).to(u.device)
        ways = torch.stack([u.flatten(2).index_select(2, route) for route in routes], dim=1)
        back = zip(self.ssm(ways).unbind(1), inverse_order(routes), strict=True)
        y = torch.stack([way.index_select(2, order) for way, order in back]).sum(0).view(u.shape)
        return self.out(y.movedim(1, -1).to(x.dtype) * F.silu(self.gate(x))).movedim(-1, 1)


class PooledChannelMixer(nn.Module):
    """The selective channel mixer of a map averaged to side x side tokens, interpolated back to its size.

    Averages are over boxes (adaptive pooling), the way back is bilinear; a map of side x side stays as it is.
    """

    def __init__(self, dim: int, side: int, *, state_dim: int, expand: int) -> None:
        super().__init__()
        self.side = side
        self.mixer = SelectiveChannelMixer(dim, length=side * side, state_dim=state_dim, expand=expand)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        small = F.adaptive_avg_pool2d(x, self.side)
        y = self.mixer(small.flatten(2).mT).mT.reshape(small.shape)
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
