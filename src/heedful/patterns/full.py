"""Every query sees every key."""

from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.patterns.pattern import Pattern


@dataclass(frozen=True)
class Full(Pattern):
    """Every query sees every key."""

    relative = True
    exact_tiles = True

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q == q) & (k == k)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        yes = torch.ones(torch.broadcast_shapes(q_lo.shape, k_lo.shape), dtype=torch.bool, device=q_lo.device)
        return yes, yes

    def __str__(self) -> str:
        return "Full()"
