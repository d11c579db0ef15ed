"""One step of p-Laplacian message passing on the graph that attention weights make."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_EPS = 1e-8


def p_laplacian(
    weights: Float[Tensor, "b h n m"],
    query_nodes: Float[Tensor, "b h n d"],
    key_nodes: Float[Tensor, "b h m d"],
    *,
    p: Float[Tensor, "..."] | float,
    mu: Float[Tensor, "..."] | float,
    own: bool,
    zero_diagonal: bool = False,
) -> Float[Tensor, "b h n d"]:
    """Messages along edges that are weighed anew by how different their ends are.

        A'_ab = A_ab || sqrt(A_ab + e) (k_b - q_a) + e ||^(p - 2),   e = 1e-8
        F_a = (sum_b A'_ab k_b [+ 2 mu / p q_a]) / (sum_b A'_ab + 2 mu / p)

    weights        A >= 0, in the paper the attention weights
    query_nodes    q; key_nodes k
    p, mu          numbers, or tensors of one entry; p > 0
    own            queries are the last n of the keys, the graph is theirs alone, and a node keeps a share of
                   itself (the bracket). False: queries and keys are two sides of a bipartite graph
    zero_diagonal  with `own`, a node sends no message to itself; otherwise, as published, it sends one whose
                   weight holds (e sqrt(d))^(p - 2), which for p < 2 is large

    p = 2 leaves A as it is. Holds n m d numbers. Computed in float32 at least.
    Source: p-Laplacian adaptation, arXiv 2312.10613.
    """
    dtype = torch.promote_types(query_nodes.dtype, torch.float32)
    weights, query, key = weights.to(dtype), query_nodes.to(dtype), key_nodes.to(dtype)
    n, m = weights.shape[-2:]
    difference = key[:, :, None] - query[:, :, :, None]
    if own:
        itself = torch.eye(n, m, dtype=torch.bool, device=weights.device).roll(m - n, dims=1)
        # Of a node from itself nothing remains but rounding, whose gradient the power would enlarge.
        difference = difference.masked_fill(itself[..., None], 0.0)
        if zero_diagonal:
            weights = weights.masked_fill(itself, 0.0)
    length = ((weights + _EPS).sqrt()[..., None] * difference + _EPS).norm(dim=-1)
    weights = weights * length ** (p - 2)
    keep = 2 * mu / p
    messages = weights @ key
    if own:
        messages = messages + keep * query
    return (messages / (weights.sum(-1, keepdim=True) + keep)).to(query_nodes.dtype)
