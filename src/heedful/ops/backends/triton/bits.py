"""Masks of partial tiles as packed bits, each different tile once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.selection import BlockTable

_CHUNK = 1 << 22  # pairs looked at in one go
WORD = 32


def padded(size: int) -> int:
    """Lines and bits kept for a block of this size: what the largest kernel tile may ask for."""
    unit = min(128, max(WORD, 1 << (size - 1).bit_length()))
    return -(-size // unit) * unit


@dataclass(frozen=True, eq=False)
class Bits:
    """Visible pairs of t different tiles.

    number (b|1, h|1, query blocks, most): which tile an entry of the table has; 0 where it has none
    by_query (t, words of key bits, queries), by_key (t, words of query bits, keys): bit c % 32 of word
    c // 32 is column c of the tile, resp. row c
    """

    number: Tensor
    by_query: Tensor
    by_key: Tensor


def pack(table: BlockTable, partial: Tensor, relative: bool) -> Bits | None:
    """The masks of the entries marked `partial`, or None where there are none.

    relative: the mask depends on column - row alone.
    """
    entries = partial.nonzero()
    if table.mask_fn is None or not len(entries):
        return None
    b, h, i, _ = entries.unbind(1)
    j = table.index[partial]
    tiles = torch.stack([b, h, i, j], dim=1)
    alike = torch.arange(len(tiles), device=tiles.device)
    if relative:
        # Tiles of one diagonal are alike; cut tiles at the ends are kept apart.
        (bq, bk), (n, m) = table.block_size, table.shape
        cut = ((i + 1) * bq > n) * 2 + ((j + 1) * bk > m)
        _, alike = torch.unique(torch.stack([i * bq - j * bk, cut.long()], 1), dim=0, return_inverse=True)
        first = torch.full((int(alike.max()) + 1,), len(tiles), device=tiles.device)
        first.scatter_reduce_(0, alike, torch.arange(len(tiles), device=tiles.device), "amin")
        tiles = tiles[first]
    words, same = _different([_words(seen) for seen in _looks(table, tiles)])
    number = torch.zeros(partial.shape, dtype=torch.int32, device=partial.device)
    number[partial] = same[alike].to(torch.int32)
    turned = torch.cat([_words(seen.transpose(1, 2)) for seen in _unpacked(words)])
    return Bits(number, words.transpose(1, 2).contiguous(), turned.transpose(1, 2).contiguous())


def _looks(table: BlockTable, tiles: Tensor) -> Iterator[Tensor]:
    assert table.mask_fn is not None
    (bq, bk), (n, m), device = table.block_size, table.shape, tiles.device
    rows, columns = torch.arange(padded(bq), device=device), torch.arange(padded(bk), device=device)
    for part in tiles.split(max(1, _CHUNK // (len(rows) * len(columns)))):
        b, h, i, j = (t[:, None, None] for t in part.unbind(1))
        row, column = i * bq + rows[:, None], j * bk + columns
        inside = (rows[:, None] < bq) & (columns < bk) & (row < n) & (column < m)
        # Positions past the ends are moved inside, so that patterns with tables can look them up.
        yield table.mask_fn(b, h, row.clamp(max=n - 1), column.clamp(max=m - 1)) & inside


def _words(seen: Tensor) -> Tensor:
    """(t, lines, bits) bool to (t, lines, bits / 32) int32."""
    weight = torch.ones(WORD, dtype=torch.int64, device=seen.device) << torch.arange(WORD, device=seen.device)
    weight[-1] = -(1 << (WORD - 1))  # the sign
    return (seen.unflatten(-1, (-1, WORD)) * weight).sum(-1).to(torch.int32)


def _unpacked(words: Tensor) -> Iterator[Tensor]:
    bit = torch.arange(WORD, device=words.device, dtype=torch.int32)
    for part in words.split(max(1, _CHUNK // (WORD * words[0].numel()))):
        yield ((part[..., None] >> bit) & 1).bool().flatten(2)


def _different(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The different tiles of all parts, and which of them each tile is."""
    found, numbers, known = [], [], 0
    for part in parts:
        words, same = torch.unique(part.flatten(1), dim=0, return_inverse=True)
        found.append(words)
        numbers.append(same + known)
        known += len(words)
    words, same = torch.unique(torch.cat(found), dim=0, return_inverse=True)
    return words.unflatten(1, parts[0].shape[1:]), same[torch.cat(numbers)]
