"""Several documents packed into one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.pattern import Pattern
from heedful.patterns.table import Table


@dataclass(frozen=True)
class Documents(Pattern):
    """A query sees the keys of its own document (join with `Causal()` for a decoder).

    lengths: of the documents in the order in which they are packed; for rows that are packed
    differently, one sequence of lengths a batch row. Positions past the last document are padding, which
    sees nothing and is seen by nobody. ValueError if the documents are longer than the keys.
    """

    lengths: Sequence[int] | Sequence[Sequence[int]]
    exact_tiles = True
    _ids: ClassVar[Table]  # set on the instance, and no part of its value

    def __post_init__(self) -> None:
        lengths = tuple(tuple(row) if isinstance(row, Sequence) else row for row in self.lengths)
        if not lengths:
            raise ValueError("lengths is empty, must hold at least one length")
        object.__setattr__(self, "lengths", lengths)
        for row in self._rows():
            for length in row:
                check_positive("lengths", length)
        object.__setattr__(self, "_ids", Table(_ids(self._rows())))

    def _rows(self) -> tuple[tuple[int, ...], ...]:
        rows = tuple(tuple(row) for row in self.lengths if isinstance(row, Sequence))
        return rows if len(rows) == len(self.lengths) else (tuple(self.lengths),)  # type: ignore[arg-type]

    @property
    def batch(self) -> int:
        return len(self._rows())

    def check(self, n: int, m: int, query_offset: int) -> None:
        longest = max(sum(row) for row in self._rows())
        if longest > m:
            raise ValueError(f"lengths add up to {longest}, must be at most the number of keys, {m}")

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ids = self._ids.on(q.device)
        q, k = ((x + 1).clamp(min=0, max=ids.shape[-1] - 1) for x in (q, k))
        own, other = (ids[q], ids[k]) if ids.ndim == 1 else (ids[b, q], ids[b, k])
        return (own == other) & (own >= 0)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        ids = self._ids.on(q_lo.device).view(self.batch, -1)
        row = torch.arange(len(ids), device=q_lo.device).view(-1, 1, 1, 1)
        total = (ids >= 0).sum(1).view(-1, 1, 1, 1)

        def look(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """The first and last document in [lo, hi], whether there is one, whether there is no padding."""
            start, end = lo.clamp(min=0).minimum(total), hi.minimum(total - 1).clamp(min=-1)
            return ids[row, start + 1], ids[row, end + 1], start <= end, (lo >= 0) & (hi < total)

        q_first, q_last, q_live, q_whole = look(q_lo, q_hi)
        k_first, k_last, k_live, k_whole = look(k_lo, k_hi)
        some = q_live & k_live & (q_first <= k_last) & (k_first <= q_last)
        return some, q_whole & k_whole & (q_first == q_last) & (k_first == k_last) & (q_first == k_first)

    def __str__(self) -> str:
        return f"Documents({self.lengths})"


def _ids(rows: Sequence[Sequence[int]]) -> Int[Tensor, "*b positions"]:
    """Entry i + 1: the document at position i; -1 where there is none, so also at both ends."""
    ids = torch.full((len(rows), max(sum(row) for row in rows) + 2), -1)
    for row, lengths in zip(ids, rows, strict=True):
        row[1 : sum(lengths) + 1] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths).long())
    return ids if len(rows) > 1 else ids[0]
