"""DualToken-ViT: three stages of maps beside which few global tokens run through the whole network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.dualtoken_vit import DualTokenAttention
from heedful.models.backbone import Backbone, head
from heedful.models.parts import ConvNorm, DropPath, LayerNorm2d, Mlp, drop_path_rates, init_linear
from heedful.registry import register

# Depths and dims are not told in what is known of the paper. These meet its 0.5 and 1.0 G of multiply-adds;
# its parameters are recalled as 5.8M and 11.4M. Released weights, of which there are none, would not fit.
CONFIGS = {
    "dualtoken_vit_tiny": {
        "parameters": 5_806_328,
        "flops": "0.5G",
        "arguments": {"depths": (2, 2, 4), "dims": (48, 96, 192)},
    },
    "dualtoken_vit_small": {"parameters": 11_181_208, "flops": "1.0G", "arguments": {}},
}


@register("dualtoken-vit-backbone", kind="model", paper="dualtoken-vit", tags=("image", "global tokens"))
class DualTokenViT(Backbone):
    """Light image backbone of three stages, with a square of global tokens from the first block to the last.

        block:  x, g = attention(x, g);   x += gates(mlp(LN(x)))

    attention: see `DualTokenAttention`, which halves the map on its way to the global tokens 2, 1 and 0 times
    in the three stages. gates: see `BiDimensionalGates`. A stem of five convolutions makes the first map.

    classes, in_channels, features_only  see `Backbone`
    depths, dims, heads  blocks, channels and heads of each stage; heads divide dims
    mlp_ratios  width of the MLP of each stage, in dims
    side        of the square of global tokens
    mixing      whether the global tokens are mixed among each other by an MLP
    drop_path   rate of stochastic depth in the last block, growing from 0

    Source: DualToken-ViT, arXiv 2309.12424, with stem, merging and gates of LightViT, arXiv 2207.05557. What
    the paper does not tell, depths and dims among it, is heedful's completion: no published figure is meant.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1),
        "dims": (8, 8, 16),
        "heads": (2, 2, 4),
        "mlp_ratios": (2, 2, 2),
        "side": 2,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 4, 4),
        dims: Sequence[int] = (64, 128, 256),
        heads: Sequence[int] = (2, 4, 8),
        mlp_ratios: Sequence[float] = (8, 4, 4),
        side: int = 7,
        mixing: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(len(dims), depths=depths, heads=heads, mlp_ratios=mlp_ratios)
        stages = len(dims)
        self.channels, self.reductions = tuple(dims), tuple(8 * 2**stage for stage in range(stages))
        self.stem = _stem(in_channels, dims[0])
        self.tokens = nn.Parameter(torch.empty(1, side * side, dims[0]))
        self.merges, self.stages = nn.ModuleList(), nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, dim in enumerate(dims):
            if stage:
                self.merges.append(Merge(dims[stage - 1], dim))
            blocks = nn.ModuleList()
            for rate in rates[stage]:
                mixer = DualTokenAttention(
                    dim, heads=heads[stage], side=side, downsamples=stages - 1 - stage, mixing=mixing
                )
                blocks.append(Block(dim, mixer, int(mlp_ratios[stage] * dim), rate))
            self.stages.append(blocks)
        if not features_only:
            self.norm = nn.LayerNorm(dims[-1])
            self.head = head(dims[-1], classes)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.tokens, std=0.02)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = []
        x = self.stem(x)
        tokens = self.tokens.repeat(len(x), 1, 1)
        for stage, blocks in enumerate(self.stages):
            if stage:
                x, tokens = self.merges[stage - 1](x, tokens)
            for block in blocks:  # type: ignore[attr-defined]  # a ModuleList
                x, tokens = block(x, tokens)
            maps.append(x)
        return maps

    def pool(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c"]:
        return self.norm(last.mean((2, 3)))


class Block(nn.Module):
    """Dual-token attention, and an MLP with gates."""

    def __init__(self, dim: int, mixer: DualTokenAttention, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)
        self.gates = BiDimensionalGates(dim)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "b c height width"], tokens: Float[Tensor, "b s c"]
    ) -> tuple[Float[Tensor, "b c height width"], Float[Tensor, "b s c"]]:
        mixed, tokens = self.mixer.step(x, tokens)
        x = x + self.drop_path(mixed - x)
        y = self.gates(self.mlp(self.norm(x.movedim(1, -1))))
        return x + self.drop_path(y).movedim(-1, 1), tokens


class BiDimensionalGates(nn.Module):
    """One gate a channel of the image and one a place, multiplied.

    z = LN(x),  u = gelu(W_1 mean(z)),  w = gelu(W_2 z);   y = x sigmoid(W_3 u) sigmoid(W_4 [w, u])
    """

    def __init__(self, dim: int, *, ratio: float = 0.25) -> None:
        super().__init__()
        inner = int(dim * ratio)
        self.norm = nn.LayerNorm(dim)
        self.whole, self.place = nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.channel_gate, self.place_gate = nn.Linear(inner, dim), nn.Linear(2 * inner, 1)

    def forward(self, x: Float[Tensor, "b height width c"]) -> Float[Tensor, "b height width c"]:
        z = self.norm(x)
        whole = F.gelu(self.whole(z.mean((1, 2), keepdim=True)))
        place = F.gelu(self.place(z))
        both = torch.cat([place, whole.expand(*place.shape)], dim=-1)
        return x * self.channel_gate(whole).sigmoid() * self.place_gate(both).sigmoid()


class Merge(nn.Module):
    """Half the map and wider: squares of 2 x 2 as channels, and their maximum; global tokens wider too.

    A map of odd side is padded (right, bottom) with zeros, for the maximum with nothing.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.proj = nn.Linear(4 * dim, out, bias=False)
        self.pooled = nn.Linear(dim, out)
        self.token_norm = nn.LayerNorm(dim)
        self.token_proj = nn.Linear(dim, out)

    def forward(
        self, x: Float[Tensor, "b c height width"], tokens: Float[Tensor, "b s c"]
    ) -> tuple[Float[Tensor, "b e height2 width2"], Float[Tensor, "b s e"]]:
        even = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        squares = F.pixel_unshuffle(even, 2).movedim(1, -1)
        pooled = F.max_pool2d(x, 2, ceil_mode=True).movedim(1, -1)
        y = self.proj(self.norm(squares)) + self.pooled(pooled)
        return y.movedim(-1, 1), self.token_proj(self.token_norm(tokens))


def _stem(in_channels: int, dim: int) -> nn.Sequential:
    """An eighth of the side."""
    half = dim // 2
    convs = [ConvNorm(in_channels, half, 3, stride=2)]
    convs += [ConvNorm(half, half, 3, stride=stride, groups=half) for stride in (1, 1, 2)]
    steps = [step for conv in convs for step in (conv, nn.GELU())]
    return nn.Sequential(*steps, nn.Conv2d(half, dim, 3, stride=2, padding=1), LayerNorm2d(dim))
