"""From a block table to the lists that kernels walk over, made on the device of the table.

Tiles that are fully visible come first in every list, so that a kernel has one loop without a mask and
one with. For the gradients of keys and values the table is turned around by a sort. Key blocks that many
query blocks see (sinks, global tokens) are cut into pieces, so that no program works on alone for long.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.kept import kept
from heedful.ops.backends.triton.bands import Band, bands
from heedful.ops.backends.triton.bits import Bits, pack
from heedful.patterns.full import Full
from heedful.patterns.pattern import Pattern
from heedful.selection import FULL, BlockTable

BLOCK = 128  # queries and keys of a tile where a pattern leaves the choice
_PIECE = 16  # tiles of a key block that are not cut into pieces


@dataclass(frozen=True, eq=False)
class Rows:
    """For each query block its key blocks.

    bounds (b|1, h|1, query blocks, 3): begin, end of the full tiles, end; in `entry` and `mask`
    entry  (b|1, h|1, all + 1): key blocks
    mask   like entry: numbers of packed masks, or None
    """

    bounds: Tensor
    entry: Tensor
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class Columns:
    """For each key block and KV head the query blocks of all query heads of that KV head, in pieces.

    items  (b|1, hkv|1, pieces, 5): key block (-1: no work), begin, end of the full tiles, end, and the
           spare that takes the sum of this piece (-1: it is the only piece of its key block)
    spares (b|1, hkv|1, key blocks, 2): the first spare of a key block, and how many; spare_count in all
    entry  (b|1, hkv|1, all + 1): query head within the KV head * query blocks + query block
    mask   like entry, or None
    """

    items: Tensor
    spares: Tensor
    spare_count: int
    entry: Tensor
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class Lists:
    rows: Rows
    columns: Columns
    bands: tuple[Band, ...]  # what decides in partial tiles; if empty, bits do
    bits: Bits | None
    block_size: tuple[int, int]
    blocks: tuple[int, int]
    offset: int  # the position of query 0, for bands


_made: WeakKeyDictionary[BlockTable, dict[int, Lists]] = WeakKeyDictionary()


@kept(64)
def pattern_lists(
    pattern: Pattern | None, n: int, m: int, offset: int, repeats: int, device: torch.device
) -> Lists:
    """The lists of a pattern; kept, because training repeats the same shapes."""
    size = (_block(n), _block(m))
    pattern = Full() if pattern is None else pattern
    table = pattern.block_table(n, m, block_size=size, query_offset=offset, device=device)
    return _lists(table, repeats, pattern, offset, exact=True)


def table_lists(table: BlockTable, repeats: int) -> Lists:
    """The lists of a table; kept as long as the table lives."""
    known = _made.setdefault(table, {})
    if repeats not in known:
        # `Pattern.mask_fn` of queries that begin at position 0 is the method itself.
        owner = getattr(table.mask_fn, "__self__", None)
        known[repeats] = _lists(table, repeats, owner if isinstance(owner, Pattern) else None, 0, exact=False)
    return known[repeats]


def _block(tokens: int) -> int:
    return min(BLOCK, max(16, 1 << (tokens - 1).bit_length()))


def _lists(table: BlockTable, repeats: int, pattern: Pattern | None, offset: int, exact: bool) -> Lists:
    live = torch.arange(table.index.shape[-1], device=table.index.device) < table.count[..., None]
    partial = live & (table.kind != FULL)
    if table.mask_fn is None:
        partial = torch.zeros_like(partial)
    compared = (None if pattern is None else bands(pattern)) or ()
    bits = None if compared else pack(table, partial, pattern is not None and pattern.relative)
    index = table.index.masked_fill(~live, 0)
    number = None if bits is None else bits.number
    blocks = (table.count.shape[-1], -(-table.shape[1] // table.block_size[1]))
    return Lists(
        _rows(index, live, partial, number),
        _columns(index, live, partial, number, repeats, blocks[1], exact),
        compared,
        bits,
        table.block_size,
        blocks,
        offset,
    )


def _rows(index: Tensor, live: Tensor, partial: Tensor, number: Tensor | None) -> Rows:
    full = (live & ~partial).sum(-1)
    order = torch.where(live, partial.to(torch.uint8), 2).argsort(dim=-1, stable=True)
    blocks, most = index.shape[2:]
    begin = (torch.arange(blocks, device=index.device) * most).expand(full.shape)
    bounds = torch.stack([begin, begin + full, begin + live.sum(-1)], dim=-1).to(torch.int32)
    entry, mask = (None if x is None else _padded(x.gather(-1, order).flatten(2)) for x in (index, number))
    assert entry is not None
    return Rows(bounds, entry, mask)


def _columns(
    index: Tensor,
    live: Tensor,
    partial: Tensor,
    number: Tensor | None,
    repeats: int,
    key_blocks: int,
    exact: bool,
) -> Columns:
    # (b, hkv, repeats * query blocks * most): all that the query heads of a KV head see
    index, live, partial = (_by_kv_head(x, repeats) for x in (index, live, partial))
    most = max(1, index.shape[-1])
    index, live, partial = (x.flatten(2) for x in (index, live, partial))
    rank, order = torch.where(live, 2 * index + partial, 2 * key_blocks).sort(dim=-1, stable=True)
    edges = torch.arange(2 * key_blocks + 1, device=index.device).expand(*rank.shape[:2], -1)
    mark = torch.searchsorted(rank, edges.contiguous())
    begin, middle, end = mark[..., 0:-1:2], mark[..., 1::2], mark[..., 2::2]

    # An upper bound of the number of tiles serves where counting them would make the host wait.
    tiles = int(live.sum(-1).max()) if exact and live.numel() else rank.shape[-1]
    piece = max(_PIECE, -(-2 * tiles // key_blocks))
    pieces = (-(-(end - begin) // piece)).clamp(min=1)
    cut = pieces > 1
    if exact:
        total, spare_count = int(pieces.sum(-1).max()), int((pieces * cut).sum(-1).max())
    else:
        total, spare_count = key_blocks + tiles // piece, 2 * tiles // piece
    spare = (pieces * cut).cumsum(-1) - pieces * cut
    number_of = torch.arange(total, device=index.device).expand(*rank.shape[:2], -1).contiguous()
    closed = pieces.cumsum(-1)
    block = torch.searchsorted(closed, number_of, right=True)
    work = block < key_blocks
    block = block.clamp(max=key_blocks - 1)
    which = number_of - (closed - pieces).gather(-1, block)
    first = begin.gather(-1, block) + which * piece
    last = (first + piece).minimum(end.gather(-1, block))
    items = torch.stack(
        [
            block.masked_fill(~work, -1),
            first,
            middle.gather(-1, block).maximum(first).minimum(last),
            last,
            (spare.gather(-1, block) + which).masked_fill(~cut.gather(-1, block), -1),
        ],
        dim=-1,
    )
    mask = None if number is None else _by_kv_head(number, repeats).flatten(2).gather(-1, order)
    return Columns(
        items.to(torch.int32).contiguous(),
        torch.stack([spare, pieces * cut], dim=-1).to(torch.int32).contiguous(),
        spare_count,
        _padded(order // most),
        None if mask is None else _padded(mask),
    )


def _by_kv_head(x: Tensor, repeats: int) -> Tensor:
    """(b, h, query blocks, most) to (b, hkv|1, repeats, query blocks, most)."""
    if x.shape[1] == 1:
        return x[:, :, None].expand(-1, -1, repeats, -1, -1)
    return x.unflatten(1, (-1, repeats))


def _padded(x: Tensor) -> Tensor:
    # Kernels read one entry ahead.
    return F.pad(x.to(torch.int32), (0, 1)).contiguous()
