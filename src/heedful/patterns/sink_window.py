"""The first tokens and the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.pattern import Pattern
from heedful.registry import register


@register("sink-window", kind="pattern", paper="streaming-llm", tags=("sparse", "causal", "window", "sink"))
@dataclass(frozen=True)
class SinkWindow(Pattern):
    """A query sees the first `sinks` keys and the last `window` keys, itself counted.

    Visible iff k <= q and (k < sinks or q - k < window). The same as
    `Causal() & (Sink(sinks) | Window(window - 1))`, with exact tiles.
    ValueError unless window is at least 1 and sinks at least 0.
    Source: StreamingLLM, arXiv 2309.17453.
    """

    example: ClassVar[dict[str, Any]] = {"sinks": 2, "window": 5}

    sinks: int
    window: int
    exact_tiles = True

    def __post_init__(self) -> None:
        check_positive("window", self.window)
        if not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"sinks is {self.sinks!r}, must be a whole number of at least 0")

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((k < self.sinks) | (q - k < self.window))

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        some = (k_lo <= q_hi) & ((k_lo < self.sinks) | (q_lo - k_hi < self.window))
        first = k_lo.clamp(min=self.sinks)  # keys before it are sinks
        every = (k_hi <= q_lo) & ((first > k_hi) | (q_hi - first < self.window))
        return some, every

    def __str__(self) -> str:
        return f"SinkWindow({self.sinks}, {self.window})"
