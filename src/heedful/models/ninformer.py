"""NiNformer: blocks of a mixer gating unit and a feed-forward part that share one norm."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.mixers.linear.ninformer import FeedForward, MixerGatingUnit
from heedful.registry import register


class NiNformerBlock(nn.Module):
    """x += unit(LN(x));  x += FF(LN(x)), with the same norm both times.

    Arguments as in `NiNformer`. Source: NiNformer, arXiv 2403.02411.
    """

    def __init__(
        self,
        dim: int,
        *,
        length: int,
        hidden: int,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mixer = MixerGatingUnit(
            dim, length=length, hidden=hidden, dropout=dropout, device=device, dtype=dtype
        )
        self.mlp = FeedForward(dim, hidden, dropout=dropout, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        x = x + self.mixer(self.norm(x), mask=mask)
        return x + self.mlp(self.norm(x))


@register("ninformer-model", kind="model", paper="ninformer", tags=("mlp", "gate"))
class NiNformer(nn.Module):
    """Blocks of `NiNformerBlock`, one after the other: from tokens (b, n, dim) to tokens.

    dim, depth       channels, blocks
    length           the largest number of tokens
    hidden           width of all feed-forward parts
    dropout          inside them

    Source: NiNformer, arXiv 2403.02411.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "depth": 2, "length": 9, "hidden": 24}

    def __init__(
        self,
        dim: int = 256,
        *,
        depth: int = 4,
        length: int = 64,
        hidden: int = 512,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("depth", depth)
        self.blocks = nn.ModuleList(
            NiNformerBlock(dim, length=length, hidden=hidden, dropout=dropout, device=device, dtype=dtype)
            for _ in range(depth)
        )

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        for block in self.blocks:
            x = block(x, mask=mask)
        return x
