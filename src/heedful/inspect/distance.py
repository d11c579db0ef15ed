"""How far attention looks, along a sequence or over a grid of patches."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from heedful.registry import register


@register("attention-distance", kind="inspect", paper="vit-visual-analytics", tags=("distance",))
def attention_distance(
    weights: Float[Tensor, "*b r m"],
    *,
    queries: Int[Tensor, " r"] | None = None,
    distances: Real[Tensor, "r m"] | None = None,
) -> Float[Tensor, "*b r"]:
    """The mean distance that each query looks: sum_j A_ij |i - j|, or sum_j A_ij distances_ij.

    weights    A; rows that add up to 1 (to less, and the rest counts as distance 0)
    queries    the positions of the rows among the keys, by default the last r; `site.query_positions(rows)`
    distances  another table of distances, such as `grid_distances`
    """
    if distances is None:
        distances = token_distances(weights, queries).abs()
    return (weights * distances.to(weights)).sum(-1)


def token_distances(
    weights: Float[Tensor, "*b r m"], queries: Int[Tensor, " r"] | None = None
) -> Int[Tensor, "r m"]:
    """i - j for the rows and columns of a table of weights; positive where a query looks back."""
    r, m = weights.shape[-2:]
    if queries is None:
        queries = torch.arange(m - r, m, device=weights.device)
    return queries[:, None] - torch.arange(m, device=weights.device)


def grid_distances(height: int, width: int, *, euclidean: bool = False) -> Real[Tensor, "n n"]:
    """Distances of the patches of a grid, row by row: hops (Chebyshev), or Euclidean."""
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2)
    apart = place[:, None] - place
    return apart.float().norm(dim=-1) if euclidean else apart.abs().amax(-1)


@register(
    "attention-strength-by-hop", kind="inspect", paper="vit-visual-analytics", tags=("distance", "image")
)
def attention_strength_by_hop(
    weights: Float[Tensor, "*b r m"], distances: Int[Tensor, "r m"], *, hops: int | None = None
) -> tuple[Float[Tensor, "*b hops"], Float[Tensor, "*b hops"]]:
    """How strongly queries attend to what is k hops away, for k = 0, 1, ..., the mean over the queries.

        mass(k)     = mean_i sum_{j: d_ij = k} A_ij
        strength(k) = mean_i mean_{j: d_ij = k} A_ij, over the queries that have keys at k hops

    weights    A, of patches to patches; the mass over all hops is 1 less what goes to other tokens
    distances  whole numbers, such as `grid_distances`
    hops       how many k are told; default: all there are. Larger distances are left out.

    At borders there are fewer neighbours, so the two say different things.
    Source: arXiv 2303.13731; formulas ours.
    """
    hops = int(distances.max()) + 1 if hops is None else hops
    mass, strength = [], []
    for k in range(hops):
        there = (distances == k).to(weights)
        count = there.sum(-1)
        row = (weights * there).sum(-1)
        mass.append(row.mean(-1))
        have = count > 0
        strength.append((row / count.clamp(min=1)).sum(-1) / have.sum().clamp(min=1))
    return torch.stack(mass, -1), torch.stack(strength, -1)
