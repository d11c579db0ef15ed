"""Visual tokens that see only themselves, before text that sees everything up to itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from heedful.patterns.pattern import Pattern
from heedful.registry import register


@register("composite", kind="pattern", paper="ee-mllm", tags=("sparse", "causal", "multimodal"))
@dataclass(frozen=True)
class Composite(Pattern):
    """The first `num_visual` positions are visual and see only themselves; the rest is causal.

    Visible iff q < num_visual ? k == q : k <= q. Of n tokens, v of them visual, that is
    v + (n - v) v + (n - v) (n - v + 1) / 2 pairs. In a pretrained model, with
    `heedful.hf.use_pattern(Composite(v))`, it is the training-free form of the paper.
    ValueError unless num_visual is at least 0. Source: EE-MLLM, arXiv 2408.11795.
    """

    example: ClassVar[dict[str, Any]] = {"num_visual": 9}

    num_visual: int
    exact_tiles = True

    def __post_init__(self) -> None:
        if not isinstance(self.num_visual, int) or self.num_visual < 0:
            raise ValueError(f"num_visual is {self.num_visual!r}, must be a whole number of at least 0")

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k == q) | ((k < q) & (q >= self.num_visual))

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        # The queries of a tile, cut into visual ones and text.
        visual, text = q_lo < self.num_visual, q_hi >= self.num_visual
        last, first = q_hi.clamp(max=self.num_visual - 1), q_lo.clamp(min=self.num_visual)
        some = (visual & (k_lo <= last) & (k_hi >= q_lo)) | (text & (k_lo <= q_hi))
        alone = (q_lo == last) & (k_lo == k_hi) & (k_lo == q_lo)
        return some, (~visual | alone) & (~text | (k_hi <= first))

    def __str__(self) -> str:
        return f"Composite({self.num_visual})"
