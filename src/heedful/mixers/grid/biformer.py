"""Bi-level routing attention: regions pick regions, tokens attend inside the picked ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register
from heedful.routing.block_topk import block_groups, block_means, block_topk, grid_blocks

# Queries, keys, values as maps with the channels last; the picked regions; a region's height and width.
_Parts = tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int]]


@register(
    "biformer",
    kind="grid",
    paper="biformer",
    tags=("sparse", "routing"),
    aliases=("bi-level-routing-attention", "bra"),
    spatial=(2,),
    complexity="O(N k N / R C + R^2 C), R regions",
)
class BiLevelRoutingAttention(Mixer):
    """Attention of each token to all tokens of the k regions that its region picks.

        picked_r = the topk regions s with the largest mean_r(q) . mean_s(k)
        y = Wo (softmax(scale q k[picked]^T) v[picked] + DWConv(v)),   scale = qk_dim ** -0.5

    The map is cut into regions x regions parts. Means run over the full width, so that all heads share
    one routing; no gradient passes through the choice. The scale is that of the full width, not of a
    head. A map that the regions do not divide is padded with zeros (right, bottom) before the projection,
    and padded tokens take part as the authors' auto_pad has it.

    dim          channels
    heads        divides dim and qk_dim
    regions      regions along each side of the map
    topk         regions a region sees, at most regions ** 2
    qk_dim       width of queries and keys, default dim
    lepe_kernel  side of the depthwise convolution of v, odd

    Raises ValueError on heads that do not divide, topk above regions ** 2 or an even lepe_kernel.
    Source: BiFormer, arXiv 2303.08810; the module of the released T, S and B models.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "regions": 3, "topk": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        regions: int = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        lepe_kernel: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        qk_dim = dim if qk_dim is None else qk_dim
        check_divides("heads", heads, "dim", dim)
        check_divides("heads", heads, "qk_dim", qk_dim)
        check_positive("regions", regions)
        check_positive("topk", topk)
        check_positive("lepe_kernel", lepe_kernel)
        if topk > regions**2:
            raise ValueError(f"topk is {topk}, must be at most regions ** 2, which is {regions**2}")
        if lepe_kernel % 2 == 0:
            raise ValueError(f"lepe_kernel is {lepe_kernel}, must be odd")
        self.heads = heads
        self.regions = regions
        self.topk = topk
        self.qk_dim = qk_dim
        self.scale = qk_dim**-0.5
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim, device=device, dtype=dtype)
        self.lepe = nn.Conv2d(
            dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim, device=device, dtype=dtype
        )
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)

    def route(self, x: Float[Tensor, "b c height width"]) -> Int[Tensor, "b r k"]:
        """The regions that each region of the map sees, best first; regions are numbered row by row."""
        check_map("x", x, self.dim, self.entry.spatial)
        return self._parts(x.movedim(1, -1))[3]

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        height, width = x.shape[2:]
        q, k, v, picked, region = self._parts(x.movedim(1, -1))  # 1 to 5
        size = q.shape[1:3]
        # 6, 7. Each token attends to the tokens of the picked regions.
        blocks = grid_blocks(size, region, device=x.device)
        n = q.shape[1] * q.shape[2]
        seen = block_groups(blocks, blocks, picked[:, None], (n, n))
        q, k, values = (t.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = attention(q, k, values, pattern=seen, scale=self.scale)
        y = y.transpose(1, 2).flatten(2).unflatten(1, size)
        # 8. The convolution of v; then the padding is cut off.
        lepe = self.lepe(v.movedim(-1, 1)).movedim(1, -1)
        y = self.out((y + lepe)[:, :height, :width])
        return y.movedim(-1, 1)

    def _parts(self, x: Float[Tensor, "b height width c"]) -> _Parts:
        x = _pad(x, (self.regions, self.regions))
        q, k, v = self._project(x)
        region = (x.shape[1] // self.regions, x.shape[2] // self.regions)
        return q, k, v, self._pick(q, k, region), region

    def _project(self, x: Float[Tensor, "b height width c"]) -> tuple[Tensor, ...]:
        return self.qkv(x).split([self.qk_dim, self.qk_dim, self.dim], dim=-1)

    def _pick(self, q: Tensor, k: Tensor, region: tuple[int, int]) -> Int[Tensor, "b r k"]:
        blocks = grid_blocks(q.shape[1:3], region, device=q.device)
        # One "head" of the full width: all heads share the routing. The scale does not change the order.
        q_mean, k_mean = (block_means(t.detach().flatten(1, 2)[:, None], blocks) for t in (q, k))
        return block_topk(q_mean, k_mean, min(self.topk, len(blocks)))[:, 0]


@register(
    "biformer-nchw",
    kind="grid",
    paper="biformer",
    tags=("sparse", "routing"),
    spatial=(2,),
    complexity="O(N k N / R C + R^2 C), R regions",
)
class NCHWBiLevelRoutingAttention(BiLevelRoutingAttention):
    """Bi-level routing attention as in the authors' refactored module.

    It differs from `BiLevelRoutingAttention` on maps that the regions do not divide: a region is
    (height // regions, width // regions) tokens, at least 1, so that there can be more than regions ** 2
    of them; border regions are routed by the mean of what they have; queries, keys and values are padded
    with zeros after the projection, and padded keys take part with logit 0 and value 0.

    Arguments and errors as there; on a map with fewer than topk regions all regions are seen.
    Source: BiFormer, arXiv 2303.08810.
    """

    def _parts(self, x: Float[Tensor, "b height width c"]) -> _Parts:
        q, k, v = self._project(x)
        region = (max(1, x.shape[1] // self.regions), max(1, x.shape[2] // self.regions))
        picked = self._pick(q, k, region)
        return _pad(q, region), _pad(k, region), _pad(v, region), picked, region


def _pad(x: Float[Tensor, "b height width c"], multiple: tuple[int, int]) -> Tensor:
    """Zeros at the right and the bottom, up to the next multiple."""
    down, right = -x.shape[1] % multiple[0], -x.shape[2] % multiple[1]
    return F.pad(x, (0, 0, 0, right, 0, down)) if down or right else x
