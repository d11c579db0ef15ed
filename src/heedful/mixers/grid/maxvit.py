"""MaxViT's relative attention, inside windows or among tokens spread over the whole map."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_choice, check_divides, check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register

# A block holds neighbours, a grid one token of every cell; either way (y, x) numbers the tokens of a group.
_GROUPS = {
    "block": "b (r y) (s x) c -> (b r s) (y x) c",
    "grid": "b (y r) (x s) c -> (b r s) (y x) c",
}


@register(
    "maxvit",
    kind="grid",
    paper="maxvit",
    tags=("sparse", "local", "window"),
    aliases=("max-sa", "multi-axis-attention"),
    spatial=(2,),
    complexity="O(N P^2 C), P = size",
)
class MultiAxisAttention(Mixer):
    """Attention in groups of size x size tokens, with a learned bias for each relative place.

        y_i = W_o sum_j softmax_j(head_dim^-1/2 q_i . k_j + bias[jy - iy + size - 1, jx - ix + size - 1]) v_j

    partition="block" groups neighbours: windows that do not overlap. partition="grid" groups tokens that
    lie height / size and width / size apart, and i and j count these steps; so a group spans the map.
    MaxViT puts the one after the other. A map that size does not divide is padded (right, bottom) with
    hidden tokens.

    dim        channels
    head_dim   width of a head, divides dim
    size       tokens of a group along each side
    partition  "block" or "grid"
    dropout    of the attention weights

    Raises ValueError if head_dim does not divide dim, and on another partition.
    Source: MaxViT, arXiv 2204.01697.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "head_dim": 8, "size": 3, "partition": "grid"}

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        size: int = 7,
        partition: Literal["block", "grid"] = "block",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("head_dim", head_dim, "dim", dim)
        check_positive("size", size)
        check_choice("partition", partition, tuple(_GROUPS))
        self.heads = dim // head_dim
        self.size = size
        self.partition = partition
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.relative_bias = nn.Parameter(
            torch.empty(self.heads, 2 * size - 1, 2 * size - 1, device=device, dtype=dtype)
        )
        for weight in (self.qkv.weight, self.proj.weight, self.relative_bias):
            nn.init.normal_(weight, std=0.02)
        for linear in (self.qkv, self.proj):
            nn.init.zeros_(linear.bias)

    def bias(self) -> Float[Tensor, "h n n"]:
        """The bias of the logits of a group, by the place of the key minus that of the query."""
        place = torch.arange(self.size, device=self.relative_bias.device)
        step = place - place[:, None] + self.size - 1
        bias = self.relative_bias[:, step[:, None, :, None], step[None, :, None, :]]  # h iy ix jy jx
        return bias.flatten(3, 4).flatten(1, 2)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        batch, _, height, width = x.shape
        down, right = -height % self.size, -width % self.size
        groups = _GROUPS[self.partition]
        size = {"y": self.size, "x": self.size}
        key_mask = None
        if down or right:
            x = F.pad(x, (0, right, 0, down))
            on_map = F.pad(x.new_ones(1, height, width, 1), (0, 0, 0, right, 0, down))
            key_mask = (rearrange(on_map, groups, **size)[..., 0] > 0).repeat(batch, 1)
        q, k, v = rearrange(
            self.qkv(rearrange(x.movedim(1, -1), groups, **size)),
            "g n (three h d) -> three g h n d",
            three=3,
            h=self.heads,
        )
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, bias=self.bias().to(q.dtype), key_mask=key_mask, dropout_p=dropout)
        y = self.proj(rearrange(y, "g h n d -> g n (h d)"))
        rows, columns = (height + down) // self.size, (width + right) // self.size
        before, after = groups.split(" -> ")
        y = rearrange(y, f"{after} -> {before}", r=rows, s=columns, **size)
        return y[:, :height, :width].movedim(-1, 1)
