"""HaloNet's attention: the queries of a block see the block and a margin around it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_choice, check_divides, check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register


@register(
    "halonet",
    kind="grid",
    paper="halonet",
    tags=("sparse", "local"),
    aliases=("halo-attention",),
    spatial=(2,),
    complexity="O(N W^2 C), W = block_size + 2 halo_size",
)
class HaloAttention(Mixer):
    """Attention of the pixels of a block to the window of W = block_size + 2 halo_size a side around it.

        p_ij = q_i . row[jy - iy + W - 1] + q_i . column[jx - ix + W - 1]
        y_i  = sum_j softmax_j(d^-1/2 q_i . k_j + p_ij) v_j

    i counts from the corner of the block, j from that of the window. Past the borders, and where the last
    blocks reach past the map, keys and values are zeros that take part. There is no output projection.
    The result is (b, dim_out, ceil(height / stride), ceil(width / stride)).

    dim              channels
    dim_out          channels of values and result, default dim
    heads            divides dim_out
    head_dim         width d of queries and keys of a head; default: dim_out * qk_ratio, rounded to a
                     multiple of 8, over heads
    block_size       side of a block, in pixels of x
    halo_size        margin of the window
    stride           1, or 2 to halve the map: every second pixel asks, or, if 2 does not divide block_size
                     or with avg_down, results are averaged in squares of 2 x 2 (cut at odd borders)
    scale_pos_embed  the scale d^-1/2 also multiplies the terms of position
    mask_padding     hide keys that are not on the map

    Raises ValueError on heads that do not divide and sizes out of range.
    Source: HaloNet, arXiv 2103.12731, as implemented in timm (`HaloAttn`).
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "block_size": 4, "halo_size": 1}

    def __init__(
        self,
        dim: int,
        *,
        dim_out: int | None = None,
        heads: int = 8,
        head_dim: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        mask_padding: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        dim_out = dim if dim_out is None else dim_out
        check_divides("heads", heads, "dim_out", dim_out)
        head_dim = _multiple_of_8(dim_out * qk_ratio) // heads if head_dim is None else head_dim
        check_positive("head_dim", head_dim)
        check_positive("block_size", block_size)
        check_choice("stride", stride, (1, 2))
        if halo_size < 0:
            raise ValueError(f"halo_size is {halo_size}, must be at least 0")
        self.dim_out = dim_out
        self.heads = heads
        self.head_dim = head_dim
        self.block_size = block_size
        self.halo_size = halo_size
        self.window = block_size + 2 * halo_size
        self.average = stride == 2 and (avg_down or block_size % 2 == 1)
        self.query_stride = 1 if self.average else stride
        self.scale_pos_embed = scale_pos_embed
        self.mask_padding = mask_padding
        self.q = nn.Conv2d(
            dim, heads * head_dim, 1, self.query_stride, bias=qkv_bias, device=device, dtype=dtype
        )
        # Head by head: the keys of a head, then its values.
        self.kv = nn.Conv2d(dim, heads * head_dim + dim_out, 1, bias=qkv_bias, device=device, dtype=dtype)
        self.pos_embed = _WindowPositions(self.window, head_dim, device=device, dtype=dtype)
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=dim**-0.5)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c2 height2 width2"]:
        check_map("x", x, self.dim, self.entry.spatial)
        height, width = x.shape[2:]
        block, asked = self.block_size, self.block_size // self.query_stride
        rows, columns = -(-height // block), -(-width // block)
        q = self.q(x)  # 1
        asked_height, asked_width = q.shape[2:]
        q = F.pad(q, (0, columns * asked - asked_width, 0, rows * asked - asked_height))
        q = rearrange(
            q, "b (h d) (r y) (s x) -> (b r s) h y x d", h=self.heads, y=asked, x=asked
        ).contiguous()  # 2
        kv = rearrange(self._windows(self.kv(x)), "b (h d) r s y x -> (b r s) h (y x) d", h=self.heads)  # 3
        k, v = kv.split([self.head_dim, self.dim_out // self.heads], dim=-1)

        # 4. The terms of position are one number for a key's row and one for its column: further channels.
        scale = self.head_dim**-0.5
        position = self.pos_embed(q) * (scale if self.scale_pos_embed else 1.0)
        q = torch.cat([q * scale, position], dim=-1).flatten(2, 3)
        place = self.pos_embed.places().to(k).expand(*k.shape[:2], -1, -1)
        key_mask = self._on_map(x) if self.mask_padding else None
        y = attention(q, torch.cat([k, place], dim=-1), v, scale=1.0, key_mask=key_mask)

        y = rearrange(y, "(b r s) h (y x) d -> b (h d) (r y) (s x)", r=rows, s=columns, y=asked)  # 5
        y = y[:, :, :asked_height, :asked_width]
        return F.avg_pool2d(y, 2, ceil_mode=True) if self.average else y

    def _windows(self, t: Tensor) -> Tensor:
        """The windows (b, c, rows, columns, y, x) of all blocks; zeros where they reach past the map."""
        block, halo = self.block_size, self.halo_size
        t = F.pad(t, (halo, halo + -t.shape[3] % block, halo, halo + -t.shape[2] % block))
        return t.unfold(2, self.window, block).unfold(3, self.window, block)

    def _on_map(self, x: Tensor) -> Bool[Tensor, "blocks keys"]:
        on_map = self._windows(x.new_ones(1, 1, *x.shape[2:])).flatten(0, 3).flatten(1) > 0
        return on_map.repeat(len(x), 1)


class _WindowPositions(nn.Module):
    """The terms of position of queries of a block against the rows and columns of its window."""

    def __init__(
        self,
        window: int,
        head_dim: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.window = window
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim, device=device, dtype=dtype))
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=head_dim**-0.5)

    def forward(self, q: Float[Tensor, "b h y x d"]) -> Float[Tensor, "b h y x places"]:
        step = torch.arange(self.window, device=q.device) + self.window - 1
        index = step - torch.arange(q.shape[2], device=q.device)[:, None]
        row = torch.einsum("bhyxd,yjd->bhyxj", q, self.height_rel[index])
        column = torch.einsum("bhyxd,xjd->bhyxj", q, self.width_rel[index])
        return torch.cat([row, column], dim=-1)

    def places(self) -> Float[Tensor, "keys places"]:
        """One row for each key of a window: a one at its row, a one at its column."""
        one = torch.eye(self.window, device=self.height_rel.device)
        return torch.cat([one.repeat_interleave(self.window, 0), one.repeat(self.window, 1)], dim=1)


def _multiple_of_8(width: float) -> int:
    """The nearest multiple of 8, but at least 8 and no less than 90 % of width."""
    near = max(8, int(width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near
