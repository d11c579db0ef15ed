"""Routing by clusters: a query sees the keys that lie near the same centroid.

`nearest_cluster` gives every token one cluster, and `cluster_nearest` shows a query the keys nearest to its
centroid so far, a selection that never looks ahead. `closest_tokens` gives every cluster its best tokens of
the whole sequence, and `cluster_topk` makes of it the selection of the Routing Transformer as published.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.checks import check_mask, check_positive
from heedful.registry import register
from heedful.routing.best_so_far import STEP, best_before, floor, ranks
from heedful.selection import TokenGroups


def nearest_cluster(x: Float[Tensor, "b h n d"], means: Float[Tensor, "h k d"]) -> Int[Tensor, "b h n"]:
    """The centroid with the largest inner product, for each token: argmax_c x . means_c; no gradient."""
    return centroid_scores(x, means).argmax(2)


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
    scores = centroid_scores(x, means)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    best = scores.topk(min(window, n), dim=-1)
    index = best.indices.masked_fill(best.values == -torch.inf, n).sort(-1).values
    return index.masked_fill(index == n, -1)


def centroid_scores(x: Float[Tensor, "b h n d"], means: Float[Tensor, "h k d"]) -> Float[Tensor, "b h k n"]:
    """x . means of every centroid and token, in float32 at least; no gradient."""
    # Rounding to half precision would move tokens between clusters.
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return means.detach().to(wide) @ x.detach().to(wide).mT


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
    "cluster-nearest",
    kind="routing",
    paper="routing-transformer",
    tags=("sparse", "cluster", "causal"),
    complexity="O(N W D + N K log N)",
)
def cluster_nearest(
    query_cluster: Int[Tensor, "b h n"],
    key_scores: Float[Tensor, "b h k m"],
    *,
    window: int,
    key_mask: Bool[Tensor, "b m"] | None = None,
) -> TokenGroups:
    """A query sees, of the keys up to its own position, the `window` nearest to the centroid of its cluster.

        S_i = the w keys j <= i with the largest k_j . mu_c,  c the cluster of q_i

    query_cluster: numbers from 0 to k - 1 (`nearest_cluster`); the last query stands at the last key
    key_scores: k_j . mu_c (`centroid_scores`); of equal ones the latest key counts as the nearest
    key_mask: True = may be seen; other keys take no place in the window

    What a token sees depends on nothing after it. The queries of a cluster are put together if they stand
    within `window` positions, so that a group reads at most twice what its queries see.
    The result is a `pattern` for `heedful.attention`. Raises ValueError unless window >= 1 and n <= m.
    Source: Routing Transformer, arXiv 2003.05997: its decoding; in training its top-w looks ahead.
    """
    check_positive("window", window)
    (b, h, n), (k, m) = query_cluster.shape, key_scores.shape[2:]
    check_mask("key_mask", key_mask, b, m)
    if n > m:
        raise ValueError(f"query_cluster has {n} tokens, must have no more than the keys, {m}")
    device, offset = key_scores.device, m - n
    if n == 0:
        nothing = torch.full((b, h, 0, 1), -1, device=device)
        return TokenGroups(nothing, nothing, (n, m))
    if n < k:  # decoding: the centroids that are asked for are enough
        asked = query_cluster[..., None].expand(-1, -1, -1, m)
        key_scores, k = key_scores.gather(2, asked), n
        query_cluster = torch.arange(n, device=device).expand(b, h, n)
    rank, order = ranks(key_scores, None if key_mask is None else key_mask[:, None, None])
    keep = min(window, m)

    # The nearest keys before every stretch of `block` positions, and the worst that each query keeps.
    block = -(-window // STEP) * STEP
    kept, worst = [], []
    for start, best in best_before(rank, keep, offset):
        new = rank[..., start : start + STEP]
        own = query_cluster[..., start - offset : start - offset + STEP, None]
        last = best[..., max(0, keep - STEP - 1) :]
        worst.append(floor(last.gather(2, _as(own, last)), new.gather(2, _as(own, new))))
        if (start - offset) % block == 0:
            kept.append(torch.where(best < 0, -1, order.gather(-1, best.clamp(min=0))))
    least = torch.cat(worst, -1)

    # Queries by cluster and stretch, a few a group.
    stretches = len(kept)
    place = torch.arange(n, device=device)
    segment, queries = (query_cluster * stretches + place // block).sort(dim=-1, stable=True)
    first = torch.cat([torch.ones_like(segment[..., :1]), segment.diff(dim=-1)], -1) != 0
    within = place - torch.where(first, place, 0).cummax(-1).values
    rows = min(n, max(16, window // k))
    groups = n // rows + min(n, k * stretches)
    group = (within % rows == 0).cumsum(-1) - 1
    query_index = torch.full((b, h, groups * rows), -1, device=device)
    query_index = query_index.scatter_(-1, group * rows + within % rows, queries).view(b, h, groups, rows)

    # The keys of a group: those of its own stretch, and the nearest before it.
    segment = torch.zeros(b, h, groups, dtype=torch.int64, device=device).scatter_(-1, group, segment)
    near = torch.stack(kept, 3).flatten(2, 3)  # (b, h, k * stretches, keep)
    near = near.gather(2, segment[..., None].expand(-1, -1, -1, keep))
    own = (segment % stretches * block)[..., None] + torch.arange(min(block, n), device=device)
    key_index = torch.cat([torch.where(own < n, own + offset, -1), near], -1)
    if not torch.compiler.is_compiling():
        query_index, key_index = _trimmed(query_index, key_index)

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        # The queries of a group are of one cluster: no need to look it up for every pair.
        one = row[..., :1, :] if row.ndim > 1 else row
        return (column <= row + offset) & (rank[b, h, query_cluster[b, h, one], column] >= least[b, h, row])

    return TokenGroups(query_index, key_index, (n, m), visible)


def _as(cluster: Int[Tensor, "b h n 1"], x: Int[Tensor, "b h k s"]) -> Int[Tensor, "b h n s"]:
    return cluster.expand(-1, -1, -1, x.shape[-1])


def _trimmed(query_index: Tensor, key_index: Tensor) -> tuple[Tensor, Tensor]:
    """Without the groups, queries and keys that are padding for all heads."""
    count = int((query_index[..., 0] >= 0).sum(-1).max()) if query_index.numel() else 0
    query_index, key_index = query_index[:, :, :count], key_index[:, :, :count]
    rows, columns = ((index >= 0).flatten(0, 2).any(0) for index in (query_index, key_index))
    return query_index[..., rows], key_index[..., columns]
