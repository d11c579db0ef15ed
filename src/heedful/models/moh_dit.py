"""MoH-DiT: a diffusion transformer whose layers have different numbers of shared and routed heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.checks import check_map, check_positive
from heedful.mixers.heads.moh import MixtureOfHeadAttention
from heedful.models.parts import Mlp
from heedful.registry import register

FREQUENCIES = 256  # channels of the embedding of time before its network

CONFIGS = {
    "moh_dit_xl2_90": {
        "parameters": 675_666_464,
        "size": 32,
        "arguments": {
            "dim": 1152,
            "head_dim": 72,
            "heads": ((8, 9), (16, 10), (24, 9)),
            "shared_heads": ((8, 9), (16, 19)),
            "routed_heads": ((0, 19), (3, 9)),
        },
    },
    "moh_dit_xl2_75": {
        "parameters": 675_689_504,
        "size": 32,
        "arguments": {
            "dim": 1152,
            "head_dim": 72,
            "heads": ((8, 9), (16, 10), (24, 9)),
            "shared_heads": ((8, 9), (10, 10), (14, 9)),
            "routed_heads": ((0, 9), (2, 19)),
        },
    },
    "moh_dit_l2_90": {
        "parameters": 458_512_416,
        "size": 32,
        "arguments": {
            "dim": 1024,
            "head_dim": 64,
            "heads": ((8, 8), (16, 8), (24, 8)),
            "shared_heads": ((8, 8), (16, 16)),
            "routed_heads": ((0, 16), (3, 8)),
        },
    },
    "moh_dit_l2_75": {
        "parameters": 458_528_800,
        "size": 32,
        "arguments": {
            "dim": 1024,
            "head_dim": 64,
            "heads": ((8, 8), (16, 8), (24, 8)),
            "shared_heads": ((8, 16), (12, 8)),
            "routed_heads": ((0, 8), (4, 16)),
        },
    },
    "moh_dit_b2_90": {
        "parameters": 130_638_368,
        "size": 32,
        "arguments": {
            "dim": 768,
            "heads": ((12, 12),),
            "shared_heads": ((6, 5), (7, 5), (12, 2)),
            "routed_heads": ((4, 10), (0, 2)),
        },
    },
    "moh_dit_b2_75": {
        "parameters": 130_638_368,
        "size": 32,
        "arguments": {
            "dim": 768,
            "heads": ((12, 12),),
            "shared_heads": ((4, 2), (6, 8), (12, 2)),
            "routed_heads": ((2, 2), (3, 8), (0, 2)),
        },
    },
    "moh_dit_s2_90": {
        "parameters": 32_997_152,
        "size": 32,
        "arguments": {
            "dim": 384,
            "heads": ((6, 12),),
            "shared_heads": ((3, 8), (6, 4)),
            "routed_heads": ((2, 8), (0, 4)),
        },
    },
    "moh_dit_s2_75": {
        "parameters": 32_998_688,
        "size": 32,
        "arguments": {
            "dim": 384,
            "heads": ((6, 12),),
            "shared_heads": ((2, 2), (3, 8), (6, 2)),
            "routed_heads": ((1, 6), (2, 4), (0, 2)),
        },
    },
}
Runs = Sequence[tuple[int, int]]


def sine_cosine(size: int, dim: int) -> Float[Tensor, "n c"]:
    """Fixed positions of a square of patches: half of the channels for the column, half for the row."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(size, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis.expand(size, -1, -1), axis[:, None].expand(-1, size, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def modulate(
    x: Float[Tensor, "b n c"], shift: Float[Tensor, "b c"], scale: Float[Tensor, "b c"]
) -> Float[Tensor, "b n c"]:
    """(1 + scale) norm(x) + shift, norm over channels without weights, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class MoHDiTBlock(nn.Module):
    """x += g1 attention(modulate(x, s1, c1));  x += g2 mlp(modulate(x, s2, c2)).

    s1, c1, g1, s2, c2, g2 = W silu(c) + b, where c is the condition: time and label.
    """

    def __init__(self, attention: MixtureOfHeadAttention, *, hidden: int) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = Mlp(attention.dim, hidden, act=lambda: nn.GELU(approximate="tanh"))
        self.condition = nn.Linear(attention.dim, 6 * attention.dim)

    def forward(self, x: Float[Tensor, "b n c"], c: Float[Tensor, "b c"]) -> Float[Tensor, "b n c"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(c)).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(x, shift2, scale2))


@register("moh-dit", kind="model", paper="moh", tags=("image", "diffusion", "heads", "router"))
class MoHDiT(nn.Module):
    """What a noisy image (or latent) of a class holds of noise, by a transformer with mixtures of heads.

        c = time network(cos and sin of t) + E[label],  blocks: see `MoHDiTBlock`, on patches with positions

    dim           channels
    heads         runs of layers with the same number of heads: ((8, 9), (16, 10)) is 9 layers of 8, 10 of 16
    shared_heads, routed_heads  the same for shared heads and for routed heads that are on
    head_dim      channels a head; None: dim / heads
    size, in_channels, patch    side and channels of the image, side of a patch
    classes       labels; one more stands for no label
    class_dropout share of the labels that become it in training
    learn_sigma   the output has twice the channels: noise, and what its variance is made of
    mlp_ratio     inner width of the MLPs over dim

    forward: x (b, in_channels, size, size), time (b,), labels (b,). The auxiliary losses stand on the layers,
    weighed so that their sum is 0.01 of the mean over the layers with routed heads.
    Raises ValueError if the runs do not fit each other or a patch does not divide size, and on wrong shapes.
    Source: MoH, arXiv 2410.11842; DiT, arXiv 2212.09748.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": ((2, 1), (4, 1)),
        "shared_heads": ((2, 2),),
        "routed_heads": ((0, 1), (1, 1)),
        "head_dim": 4,
        "size": 8,
        "classes": 5,
    }

    def __init__(
        self,
        *,
        dim: int,
        heads: Runs,
        shared_heads: Runs,
        routed_heads: Runs,
        head_dim: int | None = None,
        size: int = 32,
        in_channels: int = 4,
        patch: int = 2,
        classes: int = 1000,
        class_dropout: float = 0.1,
        learn_sigma: bool = True,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("in_channels", in_channels), ("patch", patch)):
            check_positive(name, value)
        check_positive("classes", classes)
        if size % patch or dim % 4:
            raise ValueError(f"patch is {patch}, must divide size, {size}; dim is {dim}, must be fourfold")
        layers = [_spread(runs) for runs in (heads, shared_heads, routed_heads)]
        if len({len(layer) for layer in layers}) != 1:
            raise ValueError(
                f"heads, shared_heads and routed_heads are for {[len(layer) for layer in layers]} layers, "
                "must be for as many"
            )
        self.size, self.in_channels, self.patch = size, in_channels, patch
        self.classes, self.class_dropout = classes, class_dropout
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.embed = nn.Conv2d(in_channels, dim, patch, stride=patch)
        positions = sine_cosine(size // patch, dim).to(self.embed.weight)
        self.positions = nn.Parameter(positions[None], requires_grad=False)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.labels = nn.Embedding(classes + 1, dim)
        routed_layers = sum(k > 0 for k in layers[2])
        self.blocks = nn.ModuleList()
        for h, shared, routed in zip(*layers, strict=True):
            attention = MixtureOfHeadAttention(
                dim,
                heads=h,
                shared_heads=shared,
                routed_heads=routed,
                head_dim=head_dim,
                load_balance=0.01 / max(1, routed_layers),
            )
            self.blocks.append(MoHDiTBlock(attention, hidden=int(dim * mlp_ratio)))
        self.condition = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, patch * patch * self.out_channels)
        self._start()

    def forward(
        self,
        x: Float[Tensor, "b c height width"],
        time: Float[Tensor, " b"],
        labels: Int[Tensor, " b"],
    ) -> Float[Tensor, "b e height width"]:
        check_map("x", x, self.in_channels, (2,))
        if x.shape[2:] != (self.size, self.size):
            raise ValueError(f"x has shape {tuple(x.shape)}, must be {self.size} by {self.size} pixels")
        tokens = self.embed(x).flatten(2).mT + self.positions
        c = self.time(time_embedding(time).to(tokens.dtype)) + self.labels(self._dropped(labels))
        for block in self.blocks:
            tokens = block(tokens, c)
        tokens = self.out(modulate(tokens, *self.condition(F.silu(c)).chunk(2, dim=1)))
        grid, p = self.size // self.patch, self.patch
        return rearrange(tokens, "b (i j) (u v c) -> b c (i u) (j v)", i=grid, j=grid, u=p, v=p)

    def example_inputs(self, *, batch: int = 2) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        x = torch.randn(batch, self.in_channels, self.size, self.size)
        return {"x": x, "time": torch.rand(batch), "labels": torch.zeros(batch, dtype=torch.long)}

    def _dropped(self, labels: Tensor) -> Tensor:
        if not self.training or not self.class_dropout:
            return labels
        return labels.masked_fill(
            torch.rand(labels.shape, device=labels.device) < self.class_dropout, self.classes
        )

    def _start(self) -> None:
        """Every block begins as the identity, and the output at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.embed.weight.detach().flatten(1))
        nn.init.zeros_(self.embed.bias)  # type: ignore[arg-type]  # it has one
        for module in (*self.time, self.labels):
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, MoHDiTBlock | MoHDiT):
                nn.init.zeros_(module.condition.weight)
        nn.init.zeros_(self.out.weight)


def time_embedding(time: Float[Tensor, " b"]) -> Float[Tensor, "b f"]:
    """cos, then sin of t 10000^(-k / 128), k = 0 ... 127."""
    half = FREQUENCIES // 2
    steps = torch.arange(half, device=time.device, dtype=time.dtype)
    frequencies = torch.exp(-math.log(10000) * steps / half)
    angles = time[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _spread(runs: Runs) -> list[int]:
    return [number for number, times in runs for _ in range(times)]
