"""Routing by the worth of keys: a query sees the keys with the largest scores among those before it.

`running_topk` does so for scores of one number a key, without a table of queries and keys;
`topk_bias_mask` is the dense form for biases of one number a pair.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.checks import check_choice, check_mask, check_positive
from heedful.registry import register
from heedful.selection import TokenGroups

KINDS = ("topk", "relu")
_BLOCK = 256  # queries of a group at most


@register(
    "running-topk",
    kind="routing",
    paper="dynamic-mask-attention",
    tags=("sparse", "mask", "causal"),
    complexity="O(N W D)",
)
def running_topk(
    scores: Float[Tensor, "b h m"],
    keep: int,
    *,
    queries: int | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
) -> TokenGroups:
    """Query i sees the `keep` keys j <= i with the largest scores; of equal ones the latest.

    scores: how much a key is worth keeping, the same for all queries
    queries: how many there are, the last at the last key; default: one a key
    key_mask: True = may be seen; other keys take no place

    A key is seen from its own position on until `keep` better ones have come. The queries of a group share
    the keys kept before the group, and those of its own positions.
    The result is a `pattern` for `heedful.attention`, without gradient. Raises ValueError unless keep >= 1.
    Source: Trainable Dynamic Mask Sparse Attention, arXiv 2508.02124.
    """
    check_positive("keep", keep)
    b, h, m = scores.shape
    check_mask("key_mask", key_mask, b, m)
    n = m if queries is None else queries
    offset = m - n
    device = scores.device
    rank = _ranks(scores, key_mask)

    block = max(16, min(_BLOCK, keep // 4))
    until = torch.full_like(rank, m)  # the first position that does not see the key any more
    kept = _best(torch.arange(offset, device=device).expand(b, h, -1), rank, keep)
    rows, columns = [], []
    for start in range(offset, m, block):
        new = torch.arange(start, min(start + block, m), device=device).expand(b, h, -1)
        rows.append(_padded(new[:1, :1] - offset, block))
        columns.append(_padded(torch.cat([new, kept], -1), block + keep))
        until = _until(until, rank, kept, new, keep)
        kept = _best(torch.cat([kept, new], -1), rank, keep)
    if not rows:
        nothing = torch.full((1, 1, 0, 1), -1, device=device)
        return TokenGroups(nothing, nothing, (n, m))
    width = min(m, block + keep)

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        position = row + offset
        return (column <= position) & (position < until[b, h, column])

    return TokenGroups(torch.stack(rows, 2), torch.stack(columns, 2)[..., :width], (n, m), visible)


def global_topk(
    scores: Float[Tensor, "b h m"], keep: int, *, key_mask: Bool[Tensor, "b m"] | None = None
) -> TokenGroups:
    """Every query sees those of the `keep` best keys of the whole sequence that are not behind it.

    The choice looks at later keys, and early queries may see nothing. One query stands at each key.
    Source: Trainable Dynamic Mask Sparse Attention, arXiv 2508.02124, as in flash-dmattn.
    """
    check_positive("keep", keep)
    b, h, m = scores.shape
    check_mask("key_mask", key_mask, b, m)
    rank = _ranks(scores, key_mask)
    kept = _best(torch.arange(m, device=scores.device).expand(b, h, -1), rank, keep)
    rows = _padded(torch.arange(m, device=scores.device), -(-m // _BLOCK) * _BLOCK).view(1, 1, -1, _BLOCK)
    columns = kept[:, :, None].expand(-1, -1, rows.shape[2], -1)
    return TokenGroups(rows, columns, (m, m), lambda b, h, row, column: column <= row)


def topk_bias_mask(
    bias: Float[Tensor, "b h n m"],
    keep: int | None = None,
    *,
    mask: Bool[Tensor, "b2 h2 n m"] | None = None,
    kind: str = "topk",
    block_size: int | None = None,
) -> Bool[Tensor, "b h n m"]:
    """The dense mask of the largest biases of each row; no gradient.

    keep        keys a row keeps, with kind="topk"
    mask        True = may be kept
    kind        "topk"; "relu": what has a bias above 0
    block_size  cut the keys into blocks (the last may be shorter): a block of which more than half is kept
                is kept whole, every other is dropped. This is not held against `mask` again, so that a
                block may bring keys behind the query

    Raises ValueError on an unknown kind, and unless keep >= 1 with "topk".
    Source: Trainable Dynamic Mask Sparse Attention, arXiv 2508.02124, as in flash-dmattn.
    """
    check_choice("kind", kind, KINDS)
    m = bias.shape[-1]
    may = torch.ones_like(bias, dtype=torch.bool) if mask is None else mask.expand(bias.shape)
    bias = bias.detach().masked_fill(~may, -torch.inf)
    if kind == "relu":
        seen = bias > 0
    else:
        if keep is None:
            raise ValueError("keep is None, must be a whole number of at least 1 with kind='topk'")
        check_positive("keep", keep)
        chosen = bias.topk(min(keep, m), dim=-1).indices
        seen = torch.zeros_like(may).scatter(-1, chosen, True) & may
    if block_size is None:
        return seen
    check_positive("block_size", block_size)
    blocks = torch.arange(m, device=bias.device) // block_size
    count = bias.new_zeros(*seen.shape[:3], -(-m // block_size))
    count = count.index_add(-1, blocks, seen.to(count.dtype))
    length = torch.bincount(blocks, minlength=count.shape[-1])
    return (2 * count > length)[..., blocks]


def _ranks(scores: Tensor, key_mask: Tensor | None) -> Int[Tensor, "b h m"]:
    """A number for each key, greater for greater scores and, of equal ones, for later keys."""
    scores = scores.detach()
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None], -torch.inf)
    order = scores.sort(dim=-1, stable=True).indices
    number = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, number)


def _best(index: Tensor, rank: Tensor, keep: int) -> Int[Tensor, "b h kept"]:
    """Of the keys of `index` the `keep` best, best first."""
    found = rank.gather(-1, index).topk(min(keep, index.shape[-1]), dim=-1)
    return index.gather(-1, found.indices)


def _until(until: Tensor, rank: Tensor, kept: Tensor, new: Tensor, keep: int) -> Tensor:
    """`until` with the positions at which keys are dropped while the keys `new` come to those kept."""
    count, more = kept.shape[-1], new.shape[-1]
    if count + more <= keep:
        return until
    # Each new key drops at most one, always the worst: only the last of those kept are in danger.
    index = torch.cat([kept[..., max(0, count - more) :], new], dim=-1)
    own, arriving, before = rank.gather(-1, index), rank.gather(-1, new), rank.gather(-1, kept)
    better = torch.searchsorted(-before, -own)  # of those kept; they stand best first
    arrived = (arriving[..., None, :] > own[..., None]).cumsum(-1)
    stays = (better[..., None] + arrived < keep).sum(-1)  # how many of the new keys it survives
    ends = torch.where(stays < more, new[..., :1] + stays, until.gather(-1, index))
    return until.scatter(-1, index, ends)


def _padded(index: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(index, (0, width - index.shape[-1]), value=-1)
