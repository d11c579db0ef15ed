"""Routing by block means: a block of queries sees the key blocks that its mean query likes best.

The parts compose: `grid_blocks` cuts a sequence, an image or a video into blocks, `block_means` describes
them, a rule picks key blocks (`block_topk` here), `block_groups` turns the picks into a selection for
`heedful.attention`. `region_topk` is all of them in one call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from heedful.checks import check_positive
from heedful.registry import register
from heedful.selection import TokenGroups


def grid_blocks(
    size: Sequence[int], block_size: Sequence[int], *, device: torch.device | None = None
) -> Int[Tensor, "g l"]:
    """Token numbers of the blocks that tile a grid, blocks and their tokens in row-major order.

    size, block_size: tokens along each axis (1-D, 2-D, 3-D ...). Where a block reaches over the end of the
    grid, the tokens it lacks are -1. Raises ValueError if the two differ in length or hold less than 1.
    """
    if len(size) != len(block_size) or not size:
        raise ValueError(
            f"block_size is {tuple(block_size)}, must have one entry for each axis of {tuple(size)}"
        )
    for axis, (length, block) in enumerate(zip(size, block_size, strict=True)):
        check_positive(f"size[{axis}]", length)
        check_positive(f"block_size[{axis}]", block)
    numbers = torch.arange(math.prod(size), device=device).view(*size)
    padding = [p for s, z in zip(reversed(size), reversed(block_size), strict=True) for p in (0, -s % z)]
    numbers = F.pad(numbers, padding, value=-1)
    counts = [-(-s // z) for s, z in zip(size, block_size, strict=True)]
    split = numbers.view(*itertools.chain(*zip(counts, block_size, strict=True)))
    axes = len(size)
    order = [2 * a for a in range(axes)] + [2 * a + 1 for a in range(axes)]
    return split.permute(order).reshape(math.prod(counts), math.prod(block_size))


def block_means(x: Float[Tensor, "b h n d"], blocks: Int[Tensor, "g l"]) -> Float[Tensor, "b h g d"]:
    """The mean of the tokens of each block; entries -1 of `blocks` do not count."""
    live = (blocks >= 0)[..., None]
    tokens = x[:, :, blocks.clamp(min=0)].masked_fill(~live, 0)
    return tokens.sum(-2) / live.sum(-2).clamp(min=1)


@register("block-topk", kind="routing", paper="biformer", tags=("sparse", "block"), complexity="O(G^2 C)")
def block_topk(
    query_means: Float[Tensor, "b h g d"], key_means: Float[Tensor, "b h g2 d"], k: int
) -> Int[Tensor, "b h g k"]:
    """The k key blocks with the largest inner product of means, for each query block, best first.

        picked[i] = the k largest j of  query_means[i] . key_means[j]

    Of equal scores the block that comes first wins. Selection passes no gradient.
    Raises ValueError unless k is from 1 to the number of key blocks.
    Source: BiFormer, arXiv 2303.08810.
    """
    check_positive("k", k)
    if k > key_means.shape[2]:
        raise ValueError(f"k is {k}, must be at most the number of key blocks, {key_means.shape[2]}")
    scores = query_means.detach() @ key_means.detach().transpose(-1, -2)
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k]


def block_groups(
    query_blocks: Int[Tensor, "g lq"],
    key_blocks: Int[Tensor, "g2 lk"],
    picked: Int[Tensor, "b h g k"],
    shape: tuple[int, int],
) -> TokenGroups:
    """The selection in which each query block sees all tokens of its picked key blocks.

    picked: numbers of key blocks, all different within a row; -1 picks none, so that rows may differ in
    how many they pick. shape: the numbers of queries and keys.
    """
    keys = key_blocks[picked.clamp(min=0)].masked_fill((picked < 0)[..., None], -1)
    return TokenGroups(query_blocks[None, None], keys.flatten(-2), shape)


def region_topk(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    *,
    size: Sequence[int],
    block_size: Sequence[int],
    k: int,
) -> TokenGroups:
    """Each block of a grid sees the tokens of the k blocks whose mean key fits its mean query best.

    query, key: tokens of the grid in row-major order; each head is routed by itself. Heads share one
    graph where the scores run over the full width: give query and key before the split, with one head.
    size, block_size: tokens along each axis; border blocks may be cut short.
    The result is a `pattern` for `heedful.attention`, without gradient.
    Raises ValueError if size does not hold n tokens, or k is more than the number of blocks.
    Source: BiFormer, arXiv 2303.08810.
    """
    n = query.shape[2]
    if math.prod(size) != n:
        raise ValueError(f"size is {tuple(size)}, must hold the {n} tokens of query")
    blocks = grid_blocks(size, block_size, device=query.device)
    picked = block_topk(block_means(query, blocks), block_means(key, blocks), k)
    return block_groups(blocks, blocks, picked, (n, n))
