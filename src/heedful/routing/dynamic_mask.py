"""Routing by the worth of keys: a query sees the keys with the largest scores among those before it.

`running_topk` does so for scores of one number a key, without a table of queries and keys;
`topk_bias_mask` is the dense form for biases of one number a pair.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heedful.checks import check_choice, check_mask, check_positive
from heedful.registry import register
from heedful.routing.best_so_far import STEP, best_before, floor, ranks
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
    device, keep = scores.device, min(keep, max(m, 1))
    rank, order = ranks(scores, None if key_mask is None else key_mask[:, None])

    block = max(STEP, min(_BLOCK, keep // 4 // STEP * STEP))
    kept, worst = [], []
    for start, best in best_before(rank, keep, offset):
        worst.append(floor(best[:, :, None], rank[:, :, None, start : start + STEP]))
        if (start - offset) % block == 0:
            kept.append(torch.where(best < 0, -1, order.gather(-1, best.clamp(min=0))))
    if not kept:
        nothing = torch.full((1, 1, 0, 1), -1, device=device)
        return TokenGroups(nothing, nothing, (n, m))
    rows = _padded(torch.arange(n, device=device), len(kept) * block).view(1, 1, -1, block)
    own = torch.where(rows < 0, -1, rows + offset)[..., : min(n, block)].expand(b, h, -1, -1)
    columns = torch.cat([own, torch.stack(kept, 2)], -1)
    least = torch.cat(worst, -1)

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row + offset) & (rank[b, h, column] >= least[b, h, row])

    return TokenGroups(rows, columns, (n, m), visible)


def global_topk(
    scores: Float[Tensor, "b h m"], keep: int, *, key_mask: Bool[Tensor, "b m"] | None = None
) -> TokenGroups:
    """Every query sees those of the `keep` best keys of the whole sequence that are not behind it.

    The choice looks at later keys, and early queries may see nothing. One query stands at each key.
    Source: Trainable Dynamic Mask Sparse Attention, arXiv 2508.02124, as in flash-dmattn.
    """
    check_positive("keep", keep)
    b, _, m = scores.shape
    check_mask("key_mask", key_mask, b, m)
    _, order = ranks(scores, None if key_mask is None else key_mask[:, None])
    kept = order[..., max(0, m - keep) :]
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


def _padded(index: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(index, (0, width - index.shape[-1]), value=-1)
