"""Regions of an image: label maps, and who sees whom where tokens see their own region alone."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from heedful.checks import check_positive
from heedful.selection import BlockTable


def label_map(masks: Bool[Tensor, "masks height width"]) -> Int[Tensor, "height width"]:
    """One label a pixel from masks that may overlap, as segmenters give them: the smallest mask wins.

    The masks are numbered from 1 in the order of their areas, the largest first; pixels in no mask get a
    number of their own, the last one.
    """
    order = masks.flatten(1).sum(1).argsort(descending=True, stable=True)
    labels = torch.full(masks.shape[1:], len(masks) + 1, device=masks.device)
    for number, mask in enumerate(masks[order], start=1):
        labels = labels.masked_fill(mask, number)
    return labels


def region_table(labels: Shaped[Tensor, "b n"], *, block_size: int = 64) -> BlockTable:
    """Tokens sorted by label see those of the same label.

    labels: ascending in each row, so that a region is one run of tokens, and few blocks are visited.
    """
    check_positive("block_size", block_size)
    n = labels.shape[1]
    begin = torch.arange(0, n, block_size, device=labels.device)
    first, last = labels[:, None, begin], labels[:, None, (begin + block_size - 1).clamp(max=n - 1)]
    q_first, q_last, k_first, k_last = first[..., None], last[..., None], first[:, :, None], last[:, :, None]
    some = (q_first <= k_last) & (k_first <= q_last)
    every = (q_first == k_last) & (k_first == q_last) & (q_first == k_first)

    def same(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return labels[b, row] == labels[b, column]

    if not torch.compiler.is_compiling():
        return BlockTable.from_tiles(some, every, (block_size, block_size), (n, n), same)
    # The width of the table may not hang on the labels: as many blocks as there are.
    index = (~some).to(torch.uint8).argsort(dim=-1, stable=True)
    kind = every.to(torch.uint8).gather(-1, index)
    return BlockTable(some.sum(-1), index, kind, (block_size, block_size), (n, n), same)
