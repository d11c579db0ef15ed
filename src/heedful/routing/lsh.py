"""Routing by hashing: tokens of like hash values meet in clusters of one size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.checks import check_mask, check_positive
from heedful.registry import register
from heedful.selection import TokenGroups


def balanced_hashes(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    directions: Float[Tensor, "w r"],
    shifts: Float[Tensor, " r"],
    *,
    query_mask: Bool[Tensor, "b n"] | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
) -> tuple[Float[Tensor, "r b h n"], Float[Tensor, "r b h m"]]:
    """One number a token and round, near for queries and keys with a large inner product; no gradient.

        q' = [q, 0, sqrt(M - |q|^2)],  k' = [k, sqrt(M - |k|^2), 0],  M = max|q|^2 + max|k|^2
        hash = x' directions + shifts

    All q' and k' have one length, so that the nearest key is the one with the largest inner product.
    directions (d + 2, rounds). Hidden tokens get +inf and do not count in the maxima.
    Source: SMYRF, arXiv 2010.05315 (with E2LSH), as in Scatterbrain, arXiv 2110.15343.
    """
    if directions.shape[0] != query.shape[-1] + 2:
        raise ValueError(f"directions has {directions.shape[0]} rows, must have {query.shape[-1] + 2}")
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = query.detach().to(wide), key.detach().to(wide)
    directions, shifts = directions.to(wide), shifts.to(wide)
    hidden: list[Tensor | None] = []
    lengths = []
    for name, x, mask in (("query_mask", query, query_mask), ("key_mask", key, key_mask)):
        check_mask(name, mask, x.shape[0], x.shape[2])
        hidden.append(None if mask is None else ~mask[:, None])
        square = x.square().sum(-1)
        lengths.append(square if mask is None else square.masked_fill(~mask[:, None], 0.0))
    most = sum(F.pad(s, (0, 1)).amax(-1, keepdim=True) for s in lengths)
    rest = [(most - s).clamp(min=0).sqrt()[..., None] for s in lengths]
    zero = [torch.zeros_like(r) for r in rest]
    with torch.autocast(query.device.type, enabled=False):
        hashes = [
            (torch.cat(x, dim=-1) @ directions + shifts).movedim(-1, 0)
            for x in ((query, zero[0], rest[0]), (key, rest[1], zero[1]))
        ]
    of_query, of_key = (
        x if h is None else x.masked_fill(h, torch.inf) for x, h in zip(hashes, hidden, strict=True)
    )
    return of_query, of_key


@register(
    "lsh-clusters",
    kind="routing",
    paper="scatterbrain",
    tags=("sparse", "hash", "cluster"),
    complexity="O(N W D + N log N)",
)
def lsh_clusters(
    query_order: Int[Tensor, "b h n"],
    key_order: Int[Tensor, "b h m"],
    *,
    query_cluster_size: int,
    key_cluster_size: int,
    causal: bool = False,
) -> TokenGroups:
    """The c-th run of queries in order of their hashes sees the c-th run of keys in order of theirs.

    query_order, key_order: token numbers in the order of `balanced_hashes`, one round of it; both must give
    the same number of clusters, the last of which may be short.
    causal: a query sees no key behind it. The clusters themselves depend on all tokens all the same.
    The result is a `pattern` for `heedful.attention`, without gradient.
    Raises ValueError where the numbers of clusters differ.
    Source: SMYRF, arXiv 2010.05315, as in Scatterbrain, arXiv 2110.15343.
    """
    check_positive("query_cluster_size", query_cluster_size)
    check_positive("key_cluster_size", key_cluster_size)
    n, m = query_order.shape[-1], key_order.shape[-1]
    runs = [-(-n // query_cluster_size), -(-m // key_cluster_size)]
    if runs[0] != runs[1]:
        raise ValueError(
            f"key_cluster_size is {key_cluster_size}, which gives {runs[1]} clusters of keys, "
            f"must give {runs[0]}, those of queries"
        )
    rows, columns = (
        F.pad(order, (0, -order.shape[-1] % size), value=-1).unflatten(-1, (runs[0], size))
        for order, size in ((query_order, query_cluster_size), (key_order, key_cluster_size))
    )
    mask_fn = (lambda b, h, row, column: column <= row) if causal else None
    return TokenGroups(rows, columns, (n, m), mask_fn)


def clusters_shared(
    query_orders: Int[Tensor, "r b h n"],
    key_orders: Int[Tensor, "r b h m"],
    *,
    query_cluster_size: int,
    key_cluster_size: int,
) -> tuple[Int[Tensor, "r b h n"], Int[Tensor, "r b h m"]]:
    """The number of the cluster of every query and of every key, in each round."""
    places = []
    for orders, size in ((query_orders, query_cluster_size), (key_orders, key_cluster_size)):
        place = torch.arange(orders.shape[-1], device=orders.device).expand_as(orders)
        places.append(torch.empty_like(orders).scatter_(-1, orders, place) // size)
    return places[0], places[1]
