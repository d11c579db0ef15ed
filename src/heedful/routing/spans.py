"""Routing to spans: each query sees one run of keys, that lies wherever its own search found it."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from heedful.checks import check_positive
from heedful.registry import register
from heedful.selection import TokenGroups

_SMALL = 1 << 18  # pairs up to which a compiled call looks at all of them


@register(
    "spans",
    kind="routing",
    paper="superlinear",
    tags=("sparse", "spans"),
    complexity="O(N (S + T) C), spans of S keys, keys cut into tiles of T",
)
def span_groups(
    first: Int[Tensor, "b h n"], last: Int[Tensor, "b h n"], keys: int, *, tile: int = 256, rows: int = 256
) -> TokenGroups:
    """The selection in which query i sees the keys first_i .. last_i, both included; none where last < first.

    Queries whose spans begin in the same tile of keys are put together, at most `rows` at a time, so that a
    group reads its keys once for all of them. Spans may overlap, and differ in length; a group is as wide as
    the longest of all spans and a tile.

    keys  the number of keys; spans must lie in 0 .. keys - 1
    Raises ValueError if shapes differ or a span reaches outside.
    """
    check_positive("tile", tile)
    check_positive("rows", rows)
    if first.shape != last.shape:
        raise ValueError(f"last has shape {tuple(last.shape)}, must be first's, {tuple(first.shape)}")
    b, h, n = first.shape

    def visible(ib: Tensor, ih: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (first[ib, ih, row] <= column) & (column <= last[ib, ih, row])

    if torch.compiler.is_compiling() and n * keys <= _SMALL:
        # One group of all: its shape does not depend on the data, so that the graph stays whole.
        rows_all, keys_all = (torch.arange(size, device=first.device) for size in (n, keys))
        return TokenGroups(rows_all.expand(b, h, 1, n), keys_all[None, None, None], (n, keys), visible)
    live = last >= first
    if bool((live & ((first < 0) | (last >= keys))).any()):
        raise ValueError(f"first and last must lie in 0 .. {keys - 1} where a span is not empty")
    device = first.device
    tiles = -(-keys // tile)
    bucket = torch.where(live, first // tile, tiles).flatten(0, 1)  # empty spans come last, in no group
    order = bucket.argsort(dim=1, stable=True)
    sorted_bucket = bucket.gather(1, order)
    size = bucket.new_zeros(b * h, tiles + 1).scatter_add_(1, bucket, torch.ones_like(bucket))
    before = size.cumsum(1) - size
    place = torch.arange(n, device=device) - before.gather(1, sorted_bucket)  # within the bucket
    groups = -(-size[:, :tiles] // rows)
    start = groups.cumsum(1) - groups
    most = int(groups.sum(1).max()) if groups.numel() else 0

    alive = sorted_bucket < tiles
    group = start.gather(1, sorted_bucket.clamp(max=max(tiles - 1, 0))) + place // rows if tiles else place
    slot = torch.where(alive, group * rows + place % rows, most * rows)
    query_index = order.new_full((b * h, most * rows + 1), -1).scatter_(1, slot, order)[:, :-1]
    # A group's keys begin with the first that one of its queries sees, and end with the last.
    owner = torch.where(alive, group, most)  # one more group takes what is in none
    lo, hi = (x.flatten(0, 1).gather(1, order) for x in (first, last))
    begin = lo.new_full((b * h, most + 1), keys).scatter_reduce_(1, owner, lo, "amin")[:, :most]
    end = hi.new_full((b * h, most + 1), -1).scatter_reduce_(1, owner, hi, "amax")[:, :most]
    width = int((end - begin + 1).max().clamp(min=0)) if most else 0
    column = begin[..., None] + torch.arange(width, device=device)
    key_index = torch.where(column <= end[..., None], column, -1)
    return TokenGroups(
        query_index.view(b, h, most, rows), key_index.view(b, h, most, width), (n, keys), visible
    )
