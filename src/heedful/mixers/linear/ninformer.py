"""NiNformer: tokens gated by what a whole MLP-Mixer block makes of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import (
    check_mask,
    check_no_context,
    check_positions,
    check_positive,
    check_tokens,
)
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.registry import register


class FeedForward(nn.Module):
    """linear, GELU, dropout, linear, dropout, on the last axis."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.wide = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.narrow = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return self.drop(self.narrow(self.drop(F.gelu(self.wide(x)))))


@register(
    "ninformer",
    kind="sequence",
    paper="ninformer",
    tags=("mlp", "gate"),
    aliases=("mixer-gating-unit",),
    complexity="O(N C (L + H)), L tokens, H hidden",
)
class MixerGatingUnit(Mixer):
    """A linear map of each token times the output of an MLP-Mixer block, residuals and all; no sigmoid.

        m = x + FF_tokens(LN(x)^T)^T,  m = m + FF_channels(LN(m)),   y = (x W + b) * m

    dim      channels
    length   L, the largest number of tokens: FF_tokens has weights for each place
    hidden   width of both FF
    dropout  inside them

    A sequence shorter than length is as if zeros followed what FF_tokens gets. Masked tokens give zeros to
    it, so that they have no influence. `positions` have no effect: places are in the weights.
    Raises ValueError on wrong shapes, more than `length` tokens, or if a context or a state is given.
    Source: NiNformer, arXiv 2403.02411.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "length": 40, "hidden": 24}

    def __init__(
        self,
        dim: int,
        *,
        length: int = 64,
        hidden: int = 512,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("length", length)
        check_positive("hidden", hidden)
        self.length = length
        self.token_norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.tokens = FeedForward(length, hidden, dropout=dropout, device=device, dtype=dtype)
        self.channel_norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.channels = FeedForward(dim, hidden, dropout=dropout, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "b n c"]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        check_no_context(context, context_mask)
        n = x.shape[1]
        if n > self.length:
            raise ValueError(f"x has {n} tokens, must have at most length, which is {self.length}")
        if state is not None:
            raise ValueError("state is given, must be None: every token sees all others")

        seen = self.token_norm(x)
        if mask is not None:
            seen = seen.masked_fill(~mask[..., None], 0.0)
        m = x + self.tokens(F.pad(seen.mT, (0, self.length - n)))[..., :n].mT
        m = m + self.channels(self.channel_norm(m))
        return self.proj(x) * m
