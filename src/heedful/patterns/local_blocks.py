"""Whole blocks near the query's own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.pattern import Pattern


@dataclass(frozen=True)
class LocalBlocks(Pattern):
    """A query sees its own block of `size` positions and the `before` blocks before it.

    Visible iff 0 <= floor(q / size) - floor(k / size) <= before. Join with `Causal()` for a decoder.
    """

    size: int
    before: int
    exact_tiles = True

    def __post_init__(self) -> None:
        check_positive("size", self.size)
        if self.before < 0:
            raise ValueError(f"before is {self.before}, must be at least 0")

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        back = q // self.size - k // self.size
        return (back >= 0) & (back <= self.before)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        q_lo, q_hi, k_lo, k_hi = (x // self.size for x in (q_lo, q_hi, k_lo, k_hi))
        some = (k_lo <= q_hi) & (k_hi >= q_lo - self.before)
        return some, (k_hi <= q_lo) & (k_lo >= q_hi - self.before)

    def __str__(self) -> str:
        return f"LocalBlocks({self.size}, {self.before})"
