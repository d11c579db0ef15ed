"""A query sees itself and what came before."""

from dataclasses import dataclass

from torch import Tensor

from heedful.patterns.pattern import Pattern


@dataclass(frozen=True)
class Causal(Pattern):
    """The query at position q sees the keys at positions k <= q."""

    relative = True
    exact_tiles = True

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        return k_lo <= q_hi, k_hi <= q_lo

    def __str__(self) -> str:
        return "Causal()"
