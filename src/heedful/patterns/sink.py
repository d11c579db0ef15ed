"""The first tokens are visible to everyone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.patterns.pattern import Pattern


@dataclass(frozen=True)
class Sink(Pattern):
    """Every query sees the first `tokens` keys (attention sinks; join with `Causal()` for a decoder)."""

    tokens: int
    exact_tiles = True

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"tokens is {self.tokens}, must be at least 0")

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < self.tokens) & (q == q)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        shape = torch.broadcast_shapes(q_lo.shape, k_lo.shape)
        return (k_lo < self.tokens).expand(shape), (k_hi < self.tokens).expand(shape)

    def __str__(self) -> str:
        return f"Sink({self.tokens})"
