"""Partial attention: a convolution on some channels, cheap attention on the others, side by side."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.checks import check_divides, check_map
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register

FINE, COARSE, FAR = 20, 40, 160  # distances in whole pixels up to FINE, then logarithmic, COARSE from FAR on


class _Partial(Mixer):
    """The first dim / parts channels are convolved; the others are left to the attention."""

    def __init__(self, dim: int, parts: int, **where: Any) -> None:
        super().__init__(dim)
        check_divides("parts", parts, "dim", dim)
        if parts == 1:
            raise ValueError("parts is 1, must be at least 2: some channels must be left to attention")
        self.touched, self.rest = dim // parts, dim - dim // parts
        self.conv = nn.Conv2d(self.touched, self.touched, 3, padding=1, bias=False, **where)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        touched, rest = x.split([self.touched, self.rest], dim=1)
        return torch.cat([self.conv(touched), self.attend(rest)], dim=1)

    def attend(self, rest: Float[Tensor, "b e height width"]) -> Float[Tensor, "b e height width"]:
        raise NotImplementedError


@register(
    "partial-channel-attention",
    kind="grid",
    paper="patnet",
    tags=("gate", "conv", "mobile"),
    aliases=("pat-ch",),
    spatial=(2,),
    complexity="O(N C^2)",
)
class PartialChannelAttention(_Partial):
    """A 3 x 3 convolution on the first channels; the others are gated by their means and deviations.

        y = [conv3x3(x_1), BatchNorm(x_2 g)],   g = hardsigmoid(BatchNorm(W_m mean(x_2) + W_s std(x_2)))

    std is the unbiased one; over a single pixel, where it is not defined, 0.

    dim    channels
    parts  the first dim / parts channels are convolved

    Raises ValueError if parts do not divide dim or are 1. Source: PATNet, arXiv 2503.03148.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16}

    def __init__(
        self,
        dim: int,
        *,
        parts: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, parts, device=device, dtype=dtype)
        rest = self.rest
        self.style = nn.Conv2d(rest, rest, (1, 2), bias=False, device=device, dtype=dtype)
        self.style_norm = nn.BatchNorm2d(rest, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(rest, device=device, dtype=dtype)

    def attend(self, rest: Float[Tensor, "b e height width"]) -> Float[Tensor, "b e height width"]:
        pixels = rest.flatten(2)
        std = pixels.std(-1, correction=1 if pixels.shape[-1] > 1 else 0)
        style = torch.stack([pixels.mean(-1), std], dim=-1)[:, :, None]
        gate = F.hardsigmoid(self.style_norm(self.style(style)))
        return self.norm(rest * gate)


@register(
    "partial-self-attention",
    kind="grid",
    paper="patnet",
    tags=("dense", "conv", "mobile"),
    aliases=("pat-sf",),
    spatial=(2,),
    complexity="O(N^2 C)",
)
class PartialSelfAttention(_Partial):
    """A 3 x 3 convolution on the first channels; the others attend, with a bias by distance.

        y = [conv3x3(x_1), W_o concat_h softmax(q_h k_h^T / sqrt(d) + B_h) v_h + b_o],   q, k, v = W LN(x_2)
        B_h[i, j] = table[h, 40 + bucket(|i - j|)]

    Distances are Euclidean and rounded to whole pixels up to 20; above, 20 buckets grow with their logarithm.

    dim      channels
    heads    a divisor of the channels that attend
    parts    the first dim / parts channels are convolved
    dropout  of attention weights and of the output, in training

    Raises ValueError if parts do not divide dim or are 1, or if heads do not divide the rest.
    Source: PATNet, arXiv 2503.03148.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "dropout": 0.0}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        parts: int = 4,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, parts, device=device, dtype=dtype)
        rest = self.rest
        check_divides("heads", heads, "the channels that attend", rest)
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(rest, eps=1e-6, device=device, dtype=dtype)
        self.qkv = nn.Linear(rest, 3 * rest, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(rest, rest, device=device, dtype=dtype)
        # Offsets without a sign fill the upper half; the lower is kept for the authors' weights.
        self.bias_table = nn.Parameter(torch.zeros(heads, 2 * COARSE + 1, device=device, dtype=dtype))

    def attend(self, rest: Float[Tensor, "b e height width"]) -> Float[Tensor, "b e height width"]:
        height, width = rest.shape[2:]
        tokens = self.norm(rest.flatten(2).mT)
        q, k, v = rearrange(self.qkv(tokens), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        bias = self.bias_table[:, COARSE + distance_bucket(height, width, rest.device)]
        drop = self.dropout if self.training else 0.0
        y = attention(q, k, v, bias=bias.to(q.dtype)[None], dropout_p=drop)
        y = self.proj(rearrange(y, "b h n d -> b n (h d)"))
        return F.dropout(y, self.dropout, self.training).mT.unflatten(2, (height, width))


@register(
    "partial-spatial-attention",
    kind="grid",
    paper="patnet",
    tags=("gate", "mobile"),
    aliases=("pat-sp",),
    spatial=(2,),
    complexity="O(N C^2)",
)
class PartialSpatialAttention(Mixer):
    """The first half of the channels is gated pixel by pixel; the last half is mixed.

        y = [BatchNorm(x_1 hardsigmoid(w x_1)), W BatchNorm(x_2)]

    dim  channels; of an odd number the first part has one more

    Source: PATNet, arXiv 2503.03148.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16}

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if dim < 2:
            raise ValueError(f"dim is {dim}, must be at least 2")
        mixed = dim // 2
        self.parts = (dim - mixed, mixed)
        self.gate = nn.Conv2d(self.parts[0], 1, 1, bias=False, device=device, dtype=dtype)
        self.gate_norm = nn.BatchNorm2d(self.parts[0], device=device, dtype=dtype)
        self.mix_norm = nn.BatchNorm2d(mixed, device=device, dtype=dtype)
        self.mix = nn.Conv2d(mixed, mixed, 1, bias=False, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        gated, mixed = x.split(self.parts, dim=1)
        gated = self.gate_norm(gated * F.hardsigmoid(self.gate(gated)))
        return torch.cat([gated, self.mix(self.mix_norm(mixed))], dim=1)


def distance_bucket(height: int, width: int, device: torch.device) -> Int[Tensor, "n n"]:
    """The bucket of the distance between each two pixels of a map, row by row, 0 to 40.

    round(r) for r <= 20;   else round(20 + 20 log(r / 20) / log 8), at most 40
    """
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    rows, columns = (y[:, None] - y) ** 2, (x[:, None] - x) ** 2
    squares = (rows[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)
    r = squares.float().sqrt().round()
    growth = (COARSE - FINE) / math.log(FAR / FINE)
    far = FINE + (r.clamp(min=FINE) / FINE).log() * growth
    return torch.where(r <= FINE, r, far.round().clamp(max=COARSE)).long()
