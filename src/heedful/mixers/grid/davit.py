"""The two attentions of DaViT: between the channels of a group, and between the tokens of a window."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_choice, check_map, check_positive
from heedful.mixers.grid.map_attention import MapAttention
from heedful.ops.attention import attention
from heedful.registry import register


@register(
    "davit-channel",
    kind="channel",
    paper="davit",
    tags=("channel", "linear"),
    aliases=("channel-group-attention",),
    spatial=(1, 2, 3),
    complexity="O(N C^2 / heads)",
)
class ChannelGroupAttention(MapAttention):
    """Attention of the channels of a group to each other; the tokens are what they are compared by.

        q, k, v = W x,   A = softmax_j(scale sum_n k[n, i] v[n, j]),   o[n, i] = sum_j A[i, j] q[n, j]
        y = W_o o

    All tokens of an image share one A of d x d, d = dim / heads, so that the cost is linear in them. The
    letters are those of the released weights: k, v and q play the paper's query, key and value.

    dim         channels
    heads       groups of channels; divides dim
    qkv_bias    whether the projection of q, k and v has a bias
    scale_mode  "head": scale = d ** -0.5; "tokens": scale = N ** -0.5, as in the DaViT of Florence-2

    Raises ValueError on heads that do not divide dim or another scale_mode. Source: DaViT, arXiv 2204.03645.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        qkv_bias: bool = True,
        scale_mode: str = "head",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("scale_mode", scale_mode, ("head", "tokens"))
        super().__init__(dim, heads=heads, qkv_bias=qkv_bias, device=device, dtype=dtype)
        self.scale_mode = scale_mode

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n d"],
        size: tuple[int, ...],
    ) -> Float[Tensor, "b h n d"]:
        n, d = query.shape[2:]
        scale = (d if self.scale_mode == "head" else n) ** -0.5
        weights = ((scale * key).mT @ value).softmax(-1)  # 1, 2
        return query @ weights.mT  # 3


@register(
    "davit-window",
    kind="grid",
    paper="davit",
    tags=("sparse", "local", "window"),
    spatial=(2,),
    complexity="O(N window^2 C)",
)
class DaViTWindowAttention(MapAttention):
    """Softmax attention inside windows that do not overlap, without any encoding of positions.

        y = W_o softmax(q k^T / sqrt(d)) v   over the window^2 tokens of a token's window

    A map that the window does not divide is padded with zeros (right, bottom) before the projection. The
    padded tokens take part: they are keys and values that consist of the bias.

    dim       channels
    heads     divides dim
    window    side of a window in tokens
    qkv_bias  whether the projection of q, k and v has a bias

    Raises ValueError on heads that do not divide dim or a window below 1. Source: DaViT, arXiv 2204.03645.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "window": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 7,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive("window", window)
        super().__init__(dim, heads=heads, qkv_bias=qkv_bias, device=device, dtype=dtype)
        self.window = window

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        height, width = x.shape[2:]
        down, right = -height % self.window, -width % self.window
        if down or right:
            x = F.pad(x, (0, right, 0, down))
        return super().forward(x)[..., :height, :width]

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n d"],
        size: tuple[int, ...],
    ) -> Float[Tensor, "b h n d"]:
        rows, columns = (side // self.window for side in size)
        names = {"i": rows, "j": columns, "y": self.window, "x": self.window}
        q, k, v = (rearrange(t, "b h (i y j x) d -> (b i j) h (y x) d", **names) for t in (query, key, value))
        y = attention(q, k, v)
        return rearrange(y, "(b i j) h (y x) d -> b h (i y j x) d", **names)
