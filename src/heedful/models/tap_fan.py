"""TAP-FAN: fully attentional networks with token-aware pooling and a loss that keeps attention diverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides
from heedful.mixers.channel.fan import ChannelProcessing
from heedful.mixers.grid.tap import TokenAwarePooling
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.models.backbone import Backbone, head
from heedful.models.parts import (
    ConvNorm,
    DropPath,
    LayerNorm2d,
    LayerScale,
    Mlp,
    drop_path_rates,
    init_linear,
)
from heedful.ops.attention import attention
from heedful.ops.attention_diversity import attention_diversification_loss
from heedful.registry import register

CONFIGS = {
    "tap_fan_tiny": {"parameters": 7_404_688, "arguments": {}},
    "tap_fan_small": {"parameters": 28_513_048, "arguments": {"dim": 384, "heads": 8}},
    "tap_fan_base": {"parameters": 54_643_360, "arguments": {"dim": 448, "depth": 18, "heads": 8}},
    "tap_fan_base_hybrid": {
        "parameters": 50_735_528,
        "arguments": {"dim": 448, "depth": 16, "heads": 8, "stem": "convnext"},
    },
}


@register("tap-fan-backbone", kind="model", paper="tap-adl", tags=("image", "dense", "channel attention"))
class TAPFAN(Backbone):
    """Image backbone of attention over pooled tokens and channel processing, on one map.

        block:  x += gamma_1 attention(LN(TAP(x)));   x += gamma_2 channels(LN(x))

    Sixteenths of the image get positions of sines and cosines; behind the blocks a class token attends twice
    to all tokens, and the head sees it. In training `aux_losses["attention_diversification"]` is the loss of
    that name over all blocks, to be added to the task's with weight 1.

    classes, in_channels, features_only  see `Backbone`
    dim        channels
    depth      blocks
    heads      of each block
    scales     of token-aware pooling
    mlp_ratio  inner width of the channel processing, in dims
    stem       "conv": four convolutions with stride 2; "convnext": two stages of ConvNeXt and a convolution
    threshold  of the loss, in units of a uniform weight; None: no loss, and attention without its maps
    drop_path  rate of stochastic depth in the last block, growing from 0

    Raises ValueError if heads do not divide dim, or for another stem.
    Source: Robustifying Token Attention for Vision Transformers, arXiv 2303.11126.
    """

    example: ClassVar[dict[str, Any]] = {"classes": 10, "dim": 16, "depth": 2, "heads": 2, "scales": 3}

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        dim: int = 192,
        depth: int = 12,
        heads: int = 4,
        scales: int = 4,
        mlp_ratio: float = 4,
        stem: str = "conv",
        threshold: float | None = 2.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        if stem not in _STEMS:
            raise ValueError(f"stem is {stem!r}, must be one of {', '.join(map(repr, _STEMS))}")
        self.channels, self.reductions = (dim,), (16,)
        self.threshold = threshold
        self.aux_losses: dict[str, Tensor] = {}
        self.stem = _STEMS[stem](in_channels, dim)
        self.positions = FourierPositions(dim)
        (rates,) = drop_path_rates((depth,), drop_path)
        hidden = int(mlp_ratio * dim)
        self.blocks = nn.ModuleList(
            Block(dim, heads=heads, hidden=hidden, scales=scales, drop_path=rate) for rate in rates
        )
        if not features_only:
            self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.class_blocks = nn.ModuleList(ClassBlock(dim, heads=heads, hidden=hidden) for _ in range(2))
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.head = head(dim, classes)
            nn.init.trunc_normal_(self.class_token, std=0.02)
        self.apply(init_linear)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "aux_losses": {}}  # losses hang on a graph, which cannot be copied

    def attention_maps(self, x: Float[Tensor, "b c height width"]) -> list[Float[Tensor, "b h n n"]]:
        """The weights of every block: row i says how much token i takes from each."""
        return self._run(x, True)[1]

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        self.aux_losses = {}
        diverse = self.training and self.threshold is not None
        x, maps = self._run(x, diverse)
        if diverse:
            loss = attention_diversification_loss(maps, threshold=self.threshold)  # type: ignore[arg-type]
            self.aux_losses["attention_diversification"] = loss
        return [x]

    def pooled(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e"]:
        tokens = self.features(x)[0].flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1)
        for block in self.class_blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])

    def _run(self, x: Tensor, mapped: bool) -> tuple[Tensor, list[Tensor]]:
        x = self.stem(F.pad(x, (0, -x.shape[3] % 16, 0, -x.shape[2] % 16)))
        x = x + self.positions(x)
        maps = []
        for block in self.blocks:
            x, weights = block(x, mapped)
            if weights is not None:
                maps.append(weights)
        return x, maps


class Block(nn.Module):
    """x += gamma_1 attention(LN(TAP(x)));  x += gamma_2 channels(LN(x))

    forward: a map; gives a map, and the attention weights if `mapped`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        hidden: int,
        scales: int,
        eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.pool = TokenAwarePooling(dim, scales=scales)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = TokenMixing(dim, heads=heads)
        self.gamma1 = LayerScale(dim, init=1.0)
        self.norm2 = LayerNorm2d(dim, eps=eps)
        self.mlp = ChannelProcessing(dim, heads=heads, hidden=hidden, eps=eps)
        self.gamma2 = LayerScale(dim, init=1.0)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "b c height width"], mapped: bool = False
    ) -> tuple[Float[Tensor, "b c height width"], Float[Tensor, "b h n n"] | None]:
        tokens = self.norm1(self.pool(x).flatten(2).transpose(1, 2))
        mixed, weights = self.attn(tokens, mapped)
        mixed = mixed.transpose(1, 2).unflatten(2, x.shape[2:])
        x = x + self.drop_path(self.gamma1(mixed))
        return x + self.drop_path(self.gamma2(self.mlp(self.norm2(x)))), weights


class TokenMixing(nn.Module):
    """Softmax attention of all tokens; gives its weights too if `mapped`."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n c"], mapped: bool
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b h n n"] | None]:
        q, k, v = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (self.q(x), *self.kv(x).chunk(2, -1))
        )
        weights = None
        if mapped:
            weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            y = weights.to(v.dtype) @ v
        else:
            y = attention(q, k, v)  # type: ignore[assignment]
        return self.proj(rearrange(y, "b h n d -> b n (h d)")), weights


class ClassBlock(nn.Module):
    """The first token attends to all; the norms and residuals of the others go on, as published.

    u = LN(x);   x += gamma_1 [attention(u_0, u); u_1 ..]
    x = LN(x);   x += [gamma_2 mlp(x_0); x_1 ..]
    """

    def __init__(self, dim: int, *, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads=heads)
        self.gamma1 = LayerScale(dim, init=1.0, axis=-1)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.gamma2 = LayerScale(dim, init=1.0, axis=-1)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        u = self.norm1(x)
        x = x + self.gamma1(torch.cat([self.attn(u[:, :1], context=u), u[:, 1:]], dim=1))
        x = self.norm2(x)
        return x + torch.cat([self.gamma2(self.mlp(x[:, :1])), x[:, 1:]], dim=1)


class FourierPositions(nn.Module):
    """Sines and cosines of 16 frequencies along each axis, through a 1 x 1 convolution.

    Place i of n along an axis has the angle 2 pi i / (n + 1e-6), i = 1 .. n, at the lowest frequency.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(64, dim, 1)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "1 c height width"]:
        height, width = x.shape[2:]
        rows, columns = (_waves(n, x.device) for n in (height, width))
        waves = torch.cat([rows[:, :, None].expand(-1, -1, width), columns[:, None].expand(-1, height, -1)])
        return self.projection(waves[None].to(x.dtype))


def _waves(n: int, device: torch.device) -> Float[Tensor, "32 n"]:
    place = torch.arange(1, n + 1, device=device) / (n + 1e-6) * 2 * math.pi
    angles = place / 10000 ** (torch.arange(16, device=device)[:, None] / 16)
    return torch.stack([angles.sin(), angles.cos()], dim=1).flatten(0, 1)


def _conv_stem(in_channels: int, dim: int) -> nn.Sequential:
    widths = (in_channels, dim // 8, dim // 4, dim // 2, dim)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [ConvNorm(a, b, 3, stride=2), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def _convnext_stem(
    in_channels: int, dim: int, dims: Sequence[int] = (128, 256), depths: Sequence[int] = (3, 3)
) -> nn.Sequential:
    a, b = dims
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(in_channels, a, 4, stride=4), LayerNorm2d(a, eps=1e-6)),
        nn.Sequential(*(ConvNeXtBlock(a) for _ in range(depths[0]))),
        nn.Sequential(LayerNorm2d(a, eps=1e-6), nn.Conv2d(a, b, 2, stride=2)),
        nn.Sequential(*(ConvNeXtBlock(b) for _ in range(depths[1]))),
        nn.Conv2d(b, dim, 2, stride=2),
    )


class ConvNeXtBlock(nn.Module):
    """x += gamma W_2 gelu(W_1 LN(DWConv7x7(x)))"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = LayerScale(dim)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        y = self.mlp(self.norm(self.dwconv(x).movedim(1, -1)))
        return x + self.gamma(y.movedim(-1, 1))


_STEMS = {"conv": _conv_stem, "convnext": _convnext_stem}
