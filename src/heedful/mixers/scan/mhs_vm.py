"""Multi-head scan: heads of channels, each scanned along four routes of its own pattern."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.checks import check_choice, check_map
from heedful.mixers.mixer import Mixer
from heedful.mixers.scan.selective_ssm import SelectiveSSM
from heedful.ops.scan_orders import inverse_order, scan_routes
from heedful.registry import register

PATTERNS = ("snake", "diagonal", "spiral", "raster")  # of heads 1, 2, 3 and 4


@register(
    "multi-head-scan",
    kind="grid",
    paper="mhs-vm",
    tags=("state space", "scan routes"),
    aliases=("mhsm",),
    spatial=(2,),
    complexity="O(N C S)",
)
class MultiHeadScan2d(Mixer):
    """Selective scans in parallel subspaces, whose routes are joined where they differ.

        u_h = W_h x,   y_hr = scan of u_h along route r, brought back to the map
        y = W norm(concat_h fuse_r(y_hr)),   fuse: see `fuse_routes`

    Head 1 follows rows and columns as a snake, head 2 the diagonals, head 3 spirals, head 4 plain rows and
    columns: two routes and their reverses each (`heedful.ops.scan_orders.scan_routes`).

    dim        channels
    heads      3 or 4; a head has dim // heads channels
    state_dim  numbers of state a channel
    threshold  t of the fusion

    Raises ValueError unless heads is 3 or 4 and at most dim. Source: MHS-VM, arXiv 2406.05992.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 12, "heads": 4, "state_dim": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        state_dim: int = 16,
        threshold: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_choice("heads", heads, (3, 4))
        if dim < heads:
            raise ValueError(f"heads is {heads}, must be at most dim, which is {dim}")
        width = dim // heads
        self.heads, self.threshold = heads, threshold
        self.enter = nn.Linear(dim, heads * width, bias=False, device=device, dtype=dtype)
        self.ssm = SelectiveSSM(width, routes=4 * heads, state_dim=state_dim, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(heads * width, device=device, dtype=dtype)
        self.out = nn.Linear(heads * width, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        height, width = x.shape[2:]
        routes = torch.cat([scan_routes(name, (height, width)) for name in PATTERNS[: self.heads]])
        u = self.enter(rearrange(x, "b c y x -> b (y x) c"))
        u = rearrange(u, "b n (h d) -> b h 1 d n", h=self.heads).expand(-1, -1, 4, -1, -1).flatten(1, 2)
        y = _reordered(self.ssm(_reordered(u, routes)), inverse_order(routes))
        y = fuse_routes(y.unflatten(1, (self.heads, 4)), threshold=self.threshold)
        y = self.out(self.norm(rearrange(y, "b h d n -> b n (h d)").to(x.dtype)))
        return rearrange(y, "b (y x) c -> b c y x", y=height)


@register(
    "mhs-vm",
    kind="grid",
    paper="mhs-vm",
    tags=("state space", "scan routes", "gate"),
    aliases=("vss-gate",),
    spatial=(2,),
    complexity="O(N C^2)",
)
class MultiHeadScanGate(Mixer):
    """The mixer of MHS-VM's blocks: a multi-head scan behind a convolution, with a gate.

        u, z = W x,   y = norm(scan(silu(DWConv3x3(u)))) * silu(z)

    There is no projection after the gate. dropout is that of the output; other arguments and errors are
    those of `MultiHeadScan2d`. Source: MHS-VM, arXiv 2406.05992.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 12, "heads": 3, "state_dim": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        state_dim: int = 16,
        threshold: float = 0.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        self.enter = nn.Linear(dim, 2 * dim, bias=False, device=device, dtype=dtype)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.scan = MultiHeadScan2d(
            dim, heads=heads, state_dim=state_dim, threshold=threshold, device=device, dtype=dtype
        )
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        u, z = self.enter(x.movedim(1, -1)).chunk(2, dim=-1)
        y = self.scan(F.silu(self.conv(u.movedim(-1, 1))))
        y = self.norm(y.movedim(1, -1)) * F.silu(z)
        return self.drop(y).movedim(-1, 1)


def fuse_routes(
    y: Float[Tensor, "b h routes d n"], *, threshold: float = 0.0, eps: float = 1e-5
) -> Float[Tensor, "b h d n"]:
    """The sum over routes, weighted by how much they differ: where all agree nothing is left.

        cv = std_r(y_r) / (mean_r(y_r - min_r y_r) + eps),   out = sum_r y_r relu(cv - threshold)

    std has the denominator routes - 1. Source: MHS-VM, arXiv 2406.05992.
    """
    variance = (y - y.mean(2, keepdim=True)).square().sum(2) / (y.shape[2] - 1)
    same = variance == 0  # where the root has no derivative
    std = variance.masked_fill(same, 1.0).sqrt().masked_fill(same, 0.0)
    cv = std / ((y - y.amin(2, keepdim=True)).mean(2) + eps)
    return y.sum(2) * F.relu(cv - threshold)


def _reordered(x: Float[Tensor, "b r d n"], order: Int[Tensor, "r n"]) -> Float[Tensor, "b r d n"]:
    """Every route r of x in the order r."""
    return x.gather(3, order.to(x.device)[None, :, None].expand(x.shape))
