"""Sliding windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.pattern import Pattern
from heedful.patterns.separable import residue_tiles, runs
from heedful.selection import TokenGroups

_TILE = 128  # queries of a group


@dataclass(frozen=True)
class Window(Pattern):
    """A query sees `before` keys before it, itself, and `after` keys after it, `dilation` apart.

    Visible iff k - q is a multiple of dilation and -before <= (k - q) / dilation <= after.
    `after` defaults to `before`.
    """

    before: int
    after: int | None = None
    dilation: int = 1
    relative = True
    exact_tiles = True

    def __post_init__(self) -> None:
        if self.after is None:
            object.__setattr__(self, "after", self.before)
        for name, value in (("before", self.before), ("after", self.after)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is {value!r}, must be a whole number of at least 0")
        check_positive("dilation", self.dilation)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        before, after = self._reach()
        step = k - q
        seen = (step >= -before) & (step <= after)
        return seen if self.dilation == 1 else seen & (step % self.dilation == 0)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        before, after = self._reach()
        least, most = k_lo - q_hi, k_hi - q_lo
        some = most.clamp(max=after) // self.dilation * self.dilation >= least.clamp(min=-before)
        every = (least >= -before) & (most <= after)
        # With a dilation there are gaps: only a tile of one pair can be full.
        return some, every if self.dilation == 1 else every & some & (least == most)

    def groups(self, n: int, m: int, query_offset: int, device: torch.device) -> TokenGroups | None:
        if self.dilation == 1 or n == 0 or m == 0:
            return None
        before, after = self._reach()
        first, last = residue_tiles(n, self.dilation, _TILE)
        position, end = first + query_offset, last + query_offset
        key_first = (position - before).maximum(position % self.dilation)
        key_last = (end + after).clamp(max=m - 1)
        seen = key_first <= key_last
        queries = runs(first[seen], last[seen], self.dilation)
        keys = runs(key_first[seen], key_last[seen], self.dilation)
        return TokenGroups(
            queries[None, None].to(device), keys[None, None].to(device), (n, m), self.mask_fn(query_offset)
        )

    def _reach(self) -> tuple[int, int]:
        assert self.after is not None
        return self.before * self.dilation, self.after * self.dilation

    def __str__(self) -> str:
        parts = [str(self.before)]
        if self.after != self.before:
            parts.append(str(self.after))
        if self.dilation != 1:
            parts.append(f"dilation={self.dilation}")
        return f"Window({', '.join(parts)})"
