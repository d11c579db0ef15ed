"""Keys at distances that are powers of two, beside a short window and a sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Int, Shaped
from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.pattern import Pattern
from heedful.registry import register


@register("power", kind="pattern", paper="power-attention", tags=("sparse", "causal", "blocks"))
@dataclass(frozen=True)
class Power(Pattern):
    """A query sees blocks of keys at distances 0, 1, 2, 4, 8, ... before its own block.

    In blocks of `block_size` tokens, i of the query and j of the key, visible iff k <= q and
      j < sinks                    the first blocks, or
      i - j < window               the last blocks, its own counted, or
      i - j is a power of two.
    d layers reach every one of the 2^d - 1 blocks before a query, at O(log n) blocks a query and layer.

    window, sinks: in blocks. block_size 1 is the pattern on tokens, of which the theory speaks.
    ValueError unless block_size and window are at least 1 and sinks at least 0.
    Source: PowerAttention, arXiv 2503.03588.
    """

    example: ClassVar[dict[str, Any]] = {"block_size": 1, "window": 2}

    window: int = 5
    sinks: int = 1
    block_size: int = 256
    exact_tiles = True

    def __post_init__(self) -> None:
        check_positive("window", self.window)
        check_positive("block_size", self.block_size)
        if not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"sinks is {self.sinks!r}, must be a whole number of at least 0")

    @property
    def grain(self) -> int:
        return self.block_size

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        j = k // self.block_size
        distance = q // self.block_size - j
        # On distances, not on indices: x & (x - 1) is 0 for 0 and powers of two alone.
        kept = (j < self.sinks) | (distance < self.window) | ((distance & (distance - 1)) == 0)
        return kept & (k <= q)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        i_lo, i_hi, j_lo, j_hi = (x // self.block_size for x in (q_lo, q_hi, k_lo, k_hi))
        # Every distance between the least and the greatest occurs.
        least, most = (i_lo - j_hi).clamp(min=0), i_hi - j_lo
        near, power = least < self.window, _power_from(least) <= most
        some = (k_lo <= q_hi) & ((j_lo < self.sinks) | near | power)

        first = j_lo.clamp(min=self.sinks)  # blocks before it are sinks
        most = i_hi - first
        far = least.clamp(min=self.window)
        # Powers of two that follow each other are one power, or 1 and 2.
        powers = (_power_from(far) == far) & ((far == most) | ((far == 1) & (most == 2)))
        every = (k_hi <= q_lo) & ((first > j_hi) | (most < self.window) | powers)
        return some, every

    def __str__(self) -> str:
        return f"Power({self.window}, {self.sinks}, {self.block_size})"


def _power_from(x: Int[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The least power of two that is at least x."""
    x = (x - 1).clamp(min=0)
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | (x >> shift)
    return x + 1
