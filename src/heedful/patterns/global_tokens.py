"""Tokens that see all and are seen by all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from heedful.patterns.pattern import Pattern
from heedful.patterns.table import Table


@dataclass(frozen=True)
class Global(Pattern):
    """Visible iff the query or the key is a global token.

    tokens: how many positions at the beginning are global, or the positions themselves.
    ValueError if a number is negative.
    """

    tokens: int | Sequence[int]
    exact_tiles = True
    _marks: ClassVar[Table]  # set on the instance, and no part of its value

    def __post_init__(self) -> None:
        if isinstance(self.tokens, Sequence):
            object.__setattr__(self, "tokens", tuple(sorted(set(self.tokens))))
        for number in self.tokens if isinstance(self.tokens, tuple) else (self.tokens,):
            if not isinstance(number, int) or number < 0:
                raise ValueError(f"tokens is {self.tokens}, must hold whole numbers of at least 0")
        if isinstance(self.tokens, tuple):
            object.__setattr__(self, "_marks", Table(_marks(self.tokens)))

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self._is_global(q) | self._is_global(k)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = (self._before(hi + 1) - self._before(lo) for lo, hi in ((q_lo, q_hi), (k_lo, k_hi)))
        return (queries > 0) | (keys > 0), (queries == q_hi - q_lo + 1) | (keys == k_hi - k_lo + 1)

    def _is_global(self, x: Tensor) -> Tensor:
        if isinstance(self.tokens, int):
            return (x >= 0) & (x < self.tokens)
        marks = self._marks.on(x.device)
        return marks[(x + 1).clamp(min=0, max=len(marks) - 1)]

    def _before(self, x: Tensor) -> Tensor:
        """How many global tokens stand before position x."""
        if isinstance(self.tokens, int):
            return x.clamp(min=0, max=self.tokens)
        counts = self._marks.on(x.device).cumsum(0)
        return counts[x.clamp(min=0, max=len(counts) - 1)]

    def __str__(self) -> str:
        return f"Global({self.tokens})"


def _marks(tokens: Sequence[int]) -> Bool[Tensor, " positions"]:
    """Entry i + 1: whether the token at position i is global; none is at both ends."""
    marks = torch.zeros(max(tokens, default=-1) + 3, dtype=torch.bool)
    marks[[token + 1 for token in tokens]] = True
    return marks
