"""MS2D: one scan of the map at full resolution, three more on a map of half the sides."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.mixers.scan.selective_ssm import SelectiveSSM
from heedful.registry import register

_REDUCTION = 8  # of the channels inside the channel gate


@register(
    "msvmamba",
    kind="grid",
    paper="msvmamba",
    tags=("state space", "scan routes", "multi-scale", "gate"),
    aliases=("ms2d",),
    spatial=(2,),
    complexity="O(N C^2)",
)
class MultiScaleScan2d(Mixer):
    """A cross scan of which only the row-major direction runs at full resolution.

        u, z = W_in x,   full = silu(DWConv3x3(u)),   low = silu(DWConv7x7, stride 2 (u))
        y = norm(scan(full)) + up(sum of norm(scan) of low, rows backwards, columns, columns backwards)
        y = y sigmoid(W_2 relu(W_1 mean y)),   out = W_out (y * silu(z))

    The three directions of the low map follow one another as one sequence of one state space, so that what a
    direction leaves in the state enters the next, as published.

    dim        channels; u has expand dim
    state_dim  numbers of state a channel of u
    expand     width of u, in dim; expand dim is at least 8
    reset      let every direction of the low map start from nothing instead

    Raises ValueError if a size is below 1 or expand dim below 8. Source: MSVMamba, arXiv 2405.14174.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 8, "state_dim": 2}

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 1,
        expand: int = 2,
        reset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("expand", expand)
        inner = expand * dim
        if inner < _REDUCTION:
            raise ValueError(f"expand * dim is {inner}, must be at least {_REDUCTION}")
        self.reset = reset

        def linear(width: int, out: int) -> nn.Linear:
            return nn.Linear(width, out, bias=False, device=device, dtype=dtype)

        def conv(size: int, stride: int) -> nn.Conv2d:
            return nn.Conv2d(inner, inner, size, stride, size // 2, groups=inner, device=device, dtype=dtype)

        def ssm() -> SelectiveSSM:
            rank = math.ceil(dim / 16)
            return SelectiveSSM(inner, routes=1, state_dim=state_dim, rank=rank, device=device, dtype=dtype)

        self.enter = linear(dim, 2 * inner)
        self.conv, self.low_conv = conv(3, 1), conv(7, 2)
        self.ssm, self.low_ssm = ssm(), ssm()
        self.norm = nn.LayerNorm(inner, device=device, dtype=dtype)
        self.squeeze, self.excite = linear(inner, inner // _REDUCTION), linear(inner // _REDUCTION, inner)
        self.out = linear(inner, dim)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        u, z = self.enter(x.movedim(1, -1)).movedim(-1, 1).chunk(2, dim=1)  # 1
        y = self._full(F.silu(self.conv(u))) + self._low(F.silu(self.low_conv(u)), u.shape[2:])  # 2 to 5
        y = y.movedim(1, -1)
        gate = self.excite(F.relu(self.squeeze(y.mean((1, 2)))))
        y = y * gate.sigmoid()[:, None, None]
        return self.out(y * F.silu(z.movedim(1, -1))).movedim(-1, 1)  # 6

    def _full(self, u: Float[Tensor, "b d height width"]) -> Float[Tensor, "b d height width"]:
        y = self.ssm(u.flatten(2)[:, None])[:, 0]
        return self._normed(y, u).view_as(u)

    def _low(
        self, u: Float[Tensor, "b d height width"], size: tuple[int, int]
    ) -> Float[Tensor, "b d full_height full_width"]:
        height, width = u.shape[2:]
        rows, columns = u.flatten(2), u.mT.flatten(2)
        ways = torch.stack([rows.flip(2), columns, columns.flip(2)], dim=1)
        if self.reset:
            y = self.low_ssm(ways.flatten(0, 1)[:, None])
            y = rearrange(y, "(b r) 1 d n -> b d r n", r=3)
        else:
            y = self.low_ssm(rearrange(ways, "b r d n -> b 1 d (r n)"))[:, 0].unflatten(2, (3, -1))
        y = self._normed(y.flatten(2), u).unflatten(2, (3, -1))
        rows, columns, backwards = y.unbind(2)
        y = rows.flip(2).unflatten(2, (height, width))
        y = y + (columns + backwards.flip(2)).unflatten(2, (width, height)).mT
        return F.interpolate(y, size=tuple(size), mode="bilinear", align_corners=False)

    def _normed(self, y: Float[Tensor, "b d n"], like: Tensor) -> Float[Tensor, "b d n"]:
        return self.norm(y.mT.to(like.dtype)).mT
