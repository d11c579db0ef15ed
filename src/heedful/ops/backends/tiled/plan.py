"""From a block table to the walk: for each query block, segments of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from heedful.kept import kept
from heedful.ops.backends.tiled.tile import blind_rows
from heedful.patterns.pattern import Pattern
from heedful.selection import FULL, BlockTable

_TOGETHER = 2048  # keys up to which a row is one masked segment
_APART = 512  # keys without a mask from which on they are a segment of their own
_LONG = 4096  # keys of a row from which on query blocks are larger: each pass over the keys costs
_MASK_BYTES = 64 << 20  # masks kept with a plan; beyond that they are made anew in each pass


@dataclass(frozen=True)
class Segment:
    """Some keys of a query block: runs [start, stop) of columns.

    masked: pairs may be hidden; clear: columns, counted inside the segment, where none is even so.
    """

    runs: tuple[tuple[int, int], ...]
    masked: bool
    clear: tuple[tuple[int, int], ...] = ()

    def take(self, x: Tensor) -> Tensor:
        """The rows of x (b, h, m, d) that belong to the segment; a view if they are one run."""
        if len(self.runs) == 1:
            start, stop = self.runs[0]
            return x[:, :, start:stop]
        return torch.cat([x[:, :, start:stop] for start, stop in self.runs], dim=2)

    def add_to(self, total: Tensor, part: Tensor) -> None:
        """total[segment] += part."""
        at = 0
        for start, stop in self.runs:
            total[:, :, start:stop] += part[:, :, at : at + stop - start]
            at += stop - start

    def columns(self, device: torch.device) -> Tensor:
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self.runs])


@dataclass(frozen=True)
class Row:
    """A query block [start, stop) and the segments of keys it sees."""

    start: int
    stop: int
    segments: tuple[Segment, ...]


class Hidden(NamedTuple):
    """The additive mask of a tile, (1, 1, rows, columns): 0 where visible, else -inf; its blind rows."""

    mask: Tensor
    blind: Tensor | None


@dataclass(eq=False)
class Masks:
    """The masks of the plans of one table, each kept once however many tiles it fits."""

    _places: dict[tuple, Hidden] = field(default_factory=dict)
    _alike: dict[tuple, Hidden] = field(default_factory=dict)
    _bytes: int = 0

    def get(self, place: tuple, look: Callable[[], Tensor], dtype: torch.dtype) -> Hidden:
        """The mask of a place; `look` says which pairs (rows, columns) are visible there."""
        found = self._places.get((place, dtype))
        if found is not None:
            return found
        seen = look()
        digest = blake2b(seen.to(torch.uint8).cpu().numpy().tobytes(), digest_size=16).digest()
        content = (digest, seen.shape, dtype, seen.device)
        found = self._alike.get(content)
        if found is None:
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            mask = mask[None, None]
            found = Hidden(mask, blind_rows(mask))
            size = mask.numel() * mask.element_size()
            if self._bytes + size > _MASK_BYTES:
                return found
            self._alike[content] = found
            self._bytes += size
        self._places[place, dtype] = found
        return found


@dataclass(frozen=True, eq=False)
class Plan:
    """The walk for one group of heads (None: all of them) and batch rows (None: all)."""

    table: BlockTable
    rows: tuple[Row, ...]
    batch: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    relative: bool
    masks: Masks

    def hidden(self, row: Row, segment: Segment, dtype: torch.dtype, device: torch.device) -> Hidden | None:
        """What a tile of the row hides; None if nothing."""
        if not segment.masked or self.table.mask_fn is None:
            return None
        shift = row.start if self.relative else 0
        runs = tuple((a - shift, b - shift) for a, b in segment.runs)
        place = (self.batch, self.heads, row.start - shift, row.stop - shift, runs, device)
        return self.masks.get(place, lambda: self._visible(row, segment, device), dtype)

    def _visible(self, row: Row, segment: Segment, device: torch.device) -> Bool[Tensor, "rows columns"]:
        assert self.table.mask_fn is not None
        rows = torch.arange(row.start, row.stop, device=device)[:, None]
        columns = segment.columns(device)
        unclear = torch.ones_like(columns, dtype=torch.bool)
        for a, z in segment.clear:
            unclear[a:z] = False
        b, h = (torch.tensor(0 if x is None else x[0], device=device) for x in (self.batch, self.heads))
        seen = torch.ones(len(rows), len(columns), dtype=torch.bool, device=device)
        seen[:, unclear] = self.table.mask_fn(b, h, rows, columns[unclear][None])
        return seen


def _rows(count: Tensor, index: Tensor, kind: Tensor, table: BlockTable) -> Iterator[Row]:
    n, m = table.shape
    bq, bk = table.block_size
    for i, (many, blocks, kinds) in enumerate(
        zip(count.tolist(), index.tolist(), kind.tolist(), strict=True)
    ):
        blocks, kinds = blocks[:many], kinds[:many]
        segments: tuple[Segment, ...]
        if not blocks:
            segments = ()
        elif many * bk <= _TOGETHER and (many == kinds.count(FULL) or kinds.count(FULL) * bk < _APART):
            at = [c for c, k in enumerate(kinds) if k == FULL]
            segments = (Segment(_runs(blocks, bk, m), len(at) < many, _runs(at, bk, many * bk)),)
        else:
            full = [j for j, k in zip(blocks, kinds, strict=True) if k == FULL]
            partial = [j for j, k in zip(blocks, kinds, strict=True) if k != FULL]
            # A long run of full blocks is read in place; scattered ones are put together in pieces.
            segments = tuple(Segment((run,), False) for run in _runs(full, bk, m)) if full else ()
            if len(segments) > 4 or (segments and len(full) * bk < _APART * len(segments)):
                segments = tuple(_pieces(full, bk, m, False))
            segments += tuple(_pieces(partial, bk, m, True))
        yield Row(i * bq, min((i + 1) * bq, n), segments)


def _pieces(blocks: list[int], bk: int, m: int, masked: bool) -> Iterator[Segment]:
    step = max(1, _TOGETHER // bk)
    for at in range(0, len(blocks), step):
        yield Segment(_runs(blocks[at : at + step], bk, m), masked)


def _runs(blocks: list[int], bk: int, m: int) -> tuple[tuple[int, int], ...]:
    runs: list[list[int]] = []
    for j in blocks:
        if runs and runs[-1][1] == j * bk:
            runs[-1][1] += bk
        else:
            runs.append([j * bk, (j + 1) * bk])
    if runs:
        runs[-1][1] = min(runs[-1][1], m)
    return tuple((a, b) for a, b in runs)


def make_plans(table: BlockTable, relative: bool = False) -> list[Plan]:
    """One plan for each set of (batch row, head) pairs that share their part of the table."""
    count, index, kind = (t.cpu() for t in (table.count, table.index, table.kind))
    batch, heads = count.shape[:2]
    masks = Masks()
    plans = []
    for b in range(batch):
        for h in range(heads):
            rows = tuple(_rows(count[b, h], index[b, h], kind[b, h], table))
            own = (None if batch == 1 else (b,), None if heads == 1 else (h,))
            plans.append(Plan(table, rows, *own, relative, masks))
    return plans


def key_block(pattern: Pattern) -> int:
    """Keys of a key block: where the pattern has blocks of its own, as many as fill none by half."""
    grain = pattern.grain
    return max((size for size in range(32, 129) if grain % size == 0), default=128)


@kept(64)
def pattern_plans(pattern: Pattern, n: int, m: int, offset: int) -> list[Plan]:
    """The plans of a pattern; kept, with their masks, because training repeats the same shapes."""
    # Small query blocks waste less at the edges of a pattern; large ones are fewer.
    size = (min(max(n, 16), 128), key_block(pattern))
    table = pattern.block_table(n, m, block_size=size, query_offset=offset)
    if table.visited() * m > _LONG:
        table = pattern.block_table(n, m, block_size=(min(n, 512), size[1]), query_offset=offset)
    return make_plans(table, pattern.relative)
