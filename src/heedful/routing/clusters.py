"""Routing by clusters: a query sees the keys that lie near the same centroid.

`nearest_cluster` gives every token one cluster; `cluster_window` makes of it a selection that never looks
ahead. `closest_tokens` gives every cluster its best tokens of the whole sequence, and `cluster_topk` makes of
it the selection of the Routing Transformer as published.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.checks import check_mask, check_positive
from heedful.registry import register
from heedful.selection import TokenGroups


def nearest_cluster(x: Float[Tensor, "b h n d"], means: Float[Tensor, "h k d"]) -> Int[Tensor, "b h n"]:
    """The centroid with the largest inner product, for each token: argmax_c x . means_c; no gradient."""
    return _scores(x, means).argmax(-1)


def closest_tokens(
    x: Float[Tensor, "b h n d"],
    means: Float[Tensor, "h k d"],
    window: int,
    *,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Int[Tensor, "b h k w"]:
    """The min(window, n) tokens with the largest x . means_c for each centroid, in order of time.

    mask: True = may be taken; where a sequence has fewer such tokens than that, -1 stands at the end.
    """
    check_positive("window", window)
    n = x.shape[2]
    check_mask("mask", mask, x.shape[0], n)
    scores = _scores(x, means).mT
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    best = scores.topk(min(window, n), dim=-1)
    index = best.indices.masked_fill(best.values == -torch.inf, n).sort(-1).values
    return index.masked_fill(index == n, -1)


def _scores(x: Tensor, means: Tensor) -> Tensor:
    """x . means, (b, h, n, k); rounding to half precision would move tokens between clusters."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return x.detach().to(wide) @ means.detach().to(wide).mT


@register(
    "cluster-topk",
    kind="routing",
    paper="routing-transformer",
    tags=("sparse", "cluster"),
    complexity="O(N K D + K W^2 D)",
)
def cluster_topk(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    means: Float[Tensor, "h k d"],
    *,
    window: int,
    causal: bool = False,
    query_mask: Bool[Tensor, "b n"] | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
    eps: float = 1e-2,
) -> TokenGroups:
    """Every centroid takes its `window` nearest queries and, apart from them, its `window` nearest keys.

        group_c = (top-w queries of q . mu_c) x (top-w keys of k . mu_c)
        o_i = sum_c o_ic / (count_i + eps)

    count_i is the number of clusters that took query i; one that none took gives zeros. The choice looks at
    the whole sequence, also with `causal`, which hides from a query the keys behind its own position.

    query_mask, key_mask: True = may be taken by a cluster.
    The result is a `pattern` for `heedful.attention`, without gradient; each cluster has its own softmax.
    Raises ValueError unless window is at least 1.
    Source: Routing Transformer, arXiv 2003.05997.
    """
    n, m = query.shape[2], key.shape[2]
    query_index = closest_tokens(query, means, window, mask=query_mask)
    key_index = closest_tokens(key, means, window, mask=key_mask)
    weight = mean_weight(query_index, n, eps, query.dtype)
    offset = m - n
    mask_fn = (lambda b, h, row, column: column <= row + offset) if causal else None
    return TokenGroups(query_index, key_index, (n, m), mask_fn, query_weight=weight)


def mean_weight(
    query_index: Int[Tensor, "b h k w"], n: int, eps: float, dtype: torch.dtype
) -> Float[Tensor, "b h k w"]:
    """1 / (count + eps) for each query of each cluster, count being how many clusters took it."""
    b, h, k, w = query_index.shape
    taken = query_index.flatten(2)
    # Pads are counted one place behind the end.
    wide = torch.promote_types(dtype, torch.float32)
    count = torch.zeros(b, h, n + 1, device=taken.device, dtype=wide)
    count.scatter_add_(-1, taken % (n + 1), torch.ones_like(taken, dtype=wide))
    return (1 / (count + eps)).gather(-1, taken % (n + 1)).view(b, h, k, w).to(dtype)


@register(
    "cluster-window",
    kind="routing",
    paper="routing-transformer",
    tags=("sparse", "cluster", "causal"),
    complexity="O(N W D + N log N)",
)
def cluster_window(
    query_cluster: Int[Tensor, "b h n"],
    key_cluster: Int[Tensor, "b h m"],
    *,
    clusters: int,
    window: int,
    key_mask: Bool[Tensor, "b m"] | None = None,
    query_offset: int | None = None,
) -> TokenGroups:
    """A query sees the last `window` keys of its cluster, up to its own position.

        S_i = the last w of { j <= i : cluster(k_j) = cluster(q_i) }

    query_cluster, key_cluster: numbers from 0 to clusters - 1, one a token (`nearest_cluster`)
    key_mask: True = may be seen; other keys take no place in the window
    query_offset: the key position of query 0; defaults to m - n, so that a cache needs nothing special

    What a token sees depends on nothing after it. The keys of a cluster, in order of time, are cut into
    blocks of `window`; the queries whose last key lies in one block see that block and the one before it,
    so that a group reads at most twice what its queries see.
    The result is a `pattern` for `heedful.attention`. Raises ValueError unless window and clusters are >= 1.
    Source: Routing Transformer, arXiv 2003.05997, whose S_i has no bound; its top-w looks ahead.
    """
    check_positive("clusters", clusters)
    check_positive("window", window)
    (b, h, n), m = query_cluster.shape, key_cluster.shape[2]
    check_mask("key_mask", key_mask, b, m)
    device = query_cluster.device
    if n == 0 or m == 0:
        nothing = torch.full((b, h, 0, 1), -1, device=device)
        return TokenGroups(nothing, nothing, (n, m))
    offset = m - n if query_offset is None else query_offset

    # Keys by cluster and time. Hidden ones come last: no query asks for their cluster.
    if key_mask is not None:
        key_cluster = key_cluster.masked_fill(~key_mask[:, None], clusters)
    span = m + 1
    codes, order = (key_cluster * span + 1 + torch.arange(m, device=device)).sort(-1)
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(m, device=device).expand_as(order))
    position = (torch.arange(n, device=device) + offset + 1).clamp(0, m)
    start = torch.searchsorted(codes, query_cluster * span)
    stop = torch.searchsorted(codes, query_cluster * span + position, right=True)

    # Queries by cluster and block of their last key; those that see nothing come last and in no group.
    seen = stop - start
    block = (seen - 1).clamp(min=0) // window
    blocks = m // window + 1
    segment = torch.where(seen > 0, query_cluster * blocks + block, clusters * blocks)
    segment, queries = segment.sort(dim=-1, stable=True)
    count = torch.arange(n, device=device).expand_as(segment)
    new = torch.cat([torch.ones_like(segment[..., :1]), segment.diff(dim=-1)], -1) != 0
    within = count - torch.where(new, count, 0).cummax(-1).values
    rows = min(n, max(16, window // 4))  # queries a group: few, so that short segments waste little
    groups = n // rows + min(n, clusters + m // window)
    group = (within % rows == 0).cumsum(-1) - 1
    live = segment < clusters * blocks
    slot = torch.where(live, group * rows + within % rows, groups * rows)
    query_index = torch.full((b, h, groups * rows + 1), -1, device=device)
    query_index = query_index.scatter_(-1, slot, queries)[..., :-1].view(b, h, groups, rows)

    # The keys of a group: the block of its queries' last keys, and the block before it.
    back = window if m > window else 0
    first = start + (block * window - back).clamp(min=0)
    first, last = (_of_group(x.gather(-1, queries), group, live, groups) for x in (first, stop))
    wanted = first[..., None] + torch.arange(min(m, back + window), device=device)
    key_index = order.gather(-1, wanted.clamp(max=m - 1).flatten(2)).view(wanted.shape)
    key_index = key_index.masked_fill(wanted >= last[..., None], -1)
    if not torch.compiler.is_compiling():
        query_index, key_index = _trimmed(query_index, key_index)

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        after = stop[b, h, row] - place[b, h, column]  # 1: the last key that the query sees
        return (after > 0) & (after <= window)

    return TokenGroups(query_index, key_index, (n, m), visible)


def _of_group(x: Tensor, group: Tensor, live: Tensor, groups: int) -> Tensor:
    """The largest x (b, h, n) of each group's queries, (b, h, groups); 0 for empty groups."""
    where = torch.where(live, group, groups)
    total = x.new_zeros(*x.shape[:2], groups + 1)
    return total.scatter_reduce(-1, where, x, "amax")[..., :-1]


def _trimmed(query_index: Tensor, key_index: Tensor) -> tuple[Tensor, Tensor]:
    """Without the groups, queries and keys that are padding for all heads; pads stand at the end."""
    count = int((query_index[..., 0] >= 0).sum(-1).max()) if query_index.numel() else 0
    query_index, key_index = query_index[:, :, :count], key_index[:, :, :count]
    if not count:
        return query_index, key_index
    rows, columns = (int((index >= 0).sum(-1).max()) for index in (query_index, key_index))
    return query_index[..., :rows], key_index[..., : max(1, columns)]
