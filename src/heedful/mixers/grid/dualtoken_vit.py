"""Dual tokens: a map, and few global tokens that gather from it and give back to it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register


@register(
    "dualtoken-vit",
    kind="grid",
    paper="dualtoken-vit",
    tags=("softmax", "convolution", "landmarks", "global tokens"),
    aliases=("dual-token-attention",),
    spatial=(2,),
    complexity="O(N S C + N C^2), S global tokens",
)
class DualTokenAttention(Mixer):
    """Local places by a convolution, global ones by attention to few tokens with positions; both fused.

        l = x + W_2 gelu(W_1 LN(DWConv(x)))
        s = MHSA(LN(shrunk(l)));   g' = a g + (1 - a) s, a = sigmoid(alpha);   g' += mlp(LN(g'))
        y = x + W_f [l, MHCA(LN(l), LN(g'))]

    shrunk(l) is a side x side map: some times a depthwise convolution, batch norm, GELU and the mean of
    2 x 2, then adaptive means. The mlp first mixes the tokens among each other, then their channels. Global
    tokens g go from layer to layer (`step`); without any, g is 0.

    dim          channels
    heads        of both attentions, a divisor of dim
    side         of the square of global tokens
    downsamples  times that the map is halved on the way to that square; log2(size / side) as published
    kernel       side of the depthwise convolution, odd
    mixing       whether the mlp mixes the tokens

    Raises ValueError if heads do not divide dim and for an even kernel.
    Source: DualToken-ViT, arXiv 2309.12424; norms, widths, alpha and the fusion are heedful's completion.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 8, "heads": 2, "side": 3, "downsamples": 1, "kernel": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 2,
        side: int = 7,
        downsamples: int = 2,
        kernel: int = 7,
        mixing: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("side", side)
        check_positive("kernel", kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}, must be odd")
        if downsamples < 0:
            raise ValueError(f"downsamples is {downsamples}, must be at least 0")
        self.heads, self.side = heads, side
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, **factory)
        self.conv_norm = nn.LayerNorm(dim, **factory)
        self.conv_mlp = _mlp(dim, 4 * dim, **factory)
        self.shrink = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **factory),
                nn.BatchNorm2d(dim, **factory),
                nn.GELU(),
                nn.AvgPool2d(2, ceil_mode=True),
            )
            for _ in range(downsamples)
        )
        self.gather_norm = nn.LayerNorm(dim, **factory)
        self.gather = nn.Linear(dim, 3 * dim, **factory)
        self.gather_out = nn.Linear(dim, dim, **factory)
        self.alpha = nn.Parameter(torch.zeros(dim, **factory))
        self.mix_norm = nn.LayerNorm(dim, **factory) if mixing else None
        self.mix_mlp = _mlp(side * side, 2 * side * side, **factory) if mixing else None
        self.token_norm = nn.LayerNorm(dim, **factory)
        self.token_mlp = _mlp(dim, 2 * dim, **factory)
        self.query_norm = nn.LayerNorm(dim, **factory)
        self.query = nn.Linear(dim, dim, **factory)
        self.key_norm = nn.LayerNorm(dim, **factory)
        self.key_value = nn.Linear(dim, 2 * dim, **factory)
        self.give_out = nn.Linear(dim, dim, **factory)
        self.fuse = nn.Linear(2 * dim, dim, **factory)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, (2,))
        return self.step(x, x.new_zeros(len(x), self.side**2, self.dim))[0]

    def step(
        self, x: Float[Tensor, "b c height width"], tokens: Float[Tensor, "b s c"]
    ) -> tuple[Float[Tensor, "b c height width"], Float[Tensor, "b s c"]]:
        """y and g'."""
        local = self.local(x)
        tokens = self.enrich(tokens, self.gathered(local))
        both = torch.cat([local.movedim(1, -1), self.given(local, tokens)], dim=-1)
        return x + self.fuse(both).movedim(-1, 1), tokens

    def local(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        """1. l."""
        return x + self.conv_mlp(self.conv_norm(self.conv(x).movedim(1, -1))).movedim(-1, 1)

    def gathered(self, local: Float[Tensor, "b c height width"]) -> Float[Tensor, "b s c"]:
        """2. s: the shrunk map, attended to by itself."""
        for stage in self.shrink:
            local = stage(local)
        small = F.adaptive_avg_pool2d(local, self.side).flatten(2).mT
        query, key, value = rearrange(
            self.gather(self.gather_norm(small)), "b s (three h d) -> three b h s d", three=3, h=self.heads
        ).unbind(0)
        return self.gather_out(rearrange(attention(query, key, value), "b h s d -> b s (h d)"))

    def enrich(
        self, tokens: Float[Tensor, "b s c"], gathered: Float[Tensor, "b s c"]
    ) -> Float[Tensor, "b s c"]:
        """3. g'."""
        share = self.alpha.sigmoid()
        tokens = share * tokens + (1 - share) * gathered
        if self.mix_norm is not None and self.mix_mlp is not None:
            tokens = tokens + self.mix_mlp(self.mix_norm(tokens).mT).mT
        return tokens + self.token_mlp(self.token_norm(tokens))

    def given(
        self, local: Float[Tensor, "b c height width"], tokens: Float[Tensor, "b s c"]
    ) -> Float[Tensor, "b height width c"]:
        """4. What every place reads from the global tokens."""
        size = (local.shape[2], local.shape[3])
        query = self.query(self.query_norm(local.flatten(2).mT))
        query = rearrange(query, "b n (h d) -> b h n d", h=self.heads)
        key, value = rearrange(
            self.key_value(self.key_norm(tokens)), "b s (two h d) -> two b h s d", two=2, h=self.heads
        ).unbind(0)
        y = rearrange(attention(query, key, value), "b h n d -> b n (h d)")
        return self.give_out(y).unflatten(1, size)


def _mlp(dim: int, hidden: int, **factory: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden, **factory), nn.GELU(), nn.Linear(hidden, dim, **factory))
