"""A prefix that everybody sees, causal after it."""

from dataclasses import dataclass

from torch import Tensor

from heedful.patterns.pattern import Pattern


@dataclass(frozen=True)
class PrefixLM(Pattern):
    """The query at q sees the keys k <= q and the first `prefix` keys: the prefix sees itself both ways."""

    prefix: int
    exact_tiles = True

    def __post_init__(self) -> None:
        if self.prefix < 0:
            raise ValueError(f"prefix is {self.prefix}, must be at least 0")

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) | (k < self.prefix)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        return (k_lo <= q_hi) | (k_lo < self.prefix), (k_hi <= q_lo) | (k_hi < self.prefix)

    def __str__(self) -> str:
        return f"PrefixLM({self.prefix})"
