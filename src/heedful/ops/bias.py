"""Additive biases of low rank: B = Qb Kb^T, never stored as an n x m table (card flashbias)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heedful.registry import register


@register("flashbias", kind="bias", paper="flashbias", tags=("bias", "exact"), complexity="O(N M (d + R))")
@dataclass(frozen=True, eq=False)
class FactoredBias:
    """An additive bias B[i, j] = sum_r query[i, r] key[j, r] of rank R.

    query (b|1, h|1, n, r), key (b|1, h|1, m, r). `heedful.attention(..., bias=FactoredBias(qb, kb))`
    computes softmax(scale q k^T + Qb Kb^T) v as attention on widened queries and keys; gradients reach
    both factors. Source: FlashBias, arXiv 2505.12044.
    """

    query: Float[Tensor, "b h n r"]
    key: Float[Tensor, "b2 h2 m r"]

    def __post_init__(self) -> None:
        if self.query.ndim != 4 or self.key.ndim != 4 or self.query.shape[-1] != self.key.shape[-1]:
            raise ValueError(
                f"factors have shapes {tuple(self.query.shape)} and {tuple(self.key.shape)}, "
                "must be (b, h, n, rank) and (b, h, m, rank)"
            )

    @property
    def rank(self) -> int:
        return self.query.shape[-1]

    def dense(self) -> Float[Tensor, "b3 h3 n m"]:
        """The bias as a table."""
        return self.query @ self.key.transpose(-1, -2)

    def for_heads(self, heads: int) -> tuple[Tensor, Tensor]:
        """The factors, checked against the number of query heads."""
        for name, factor in (("query", self.query), ("key", self.key)):
            if factor.shape[1] not in (1, heads):
                raise ValueError(f"{name} factor of bias has {factor.shape[1]} heads, must be 1 or {heads}")
        return self.query, self.key


def alibi_slopes(heads: int) -> Float[Tensor, " h"]:
    """ALiBi's slopes, 2^(-8 (i + 1) / heads) for head i."""
    if heads < 1:
        raise ValueError(f"heads is {heads}, must be at least 1")
    return torch.pow(2.0, -8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads).float()


def alibi_bias(
    slopes: Float[Tensor, " h"], n: int, m: int | None = None, *, query_offset: int | None = None
) -> FactoredBias:
    """ALiBi, exactly, in rank 2: B[h, i, j] = slope_h (j - i), with i the position of the query.

    Positions are counted from the middle of the keys, so that the factors stay small. The bias of a
    far key is negative; join with a causal pattern for a decoder. Source: arXiv 2108.12409, 2505.12044.
    """
    m = n if m is None else m
    offset = m - n if query_offset is None else query_offset
    slopes = slopes[:, None]
    middle = m // 2
    i = torch.arange(n, device=slopes.device, dtype=slopes.dtype) + (offset - middle)
    j = torch.arange(m, device=slopes.device, dtype=slopes.dtype) - middle
    query = torch.stack([slopes.expand(-1, n), -slopes * i], dim=-1)
    key = torch.stack([j, torch.ones_like(j)], dim=-1)
    return FactoredBias(query[None], key[None, None])


def squared_distance_bias(
    x: Float[Tensor, "b n s"],
    y: Float[Tensor, "b m s"] | None = None,
    *,
    weight: Float[Tensor, "b h n"] | None = None,
) -> FactoredBias:
    """B[i, j] = -w_i ||x_i - y_j||^2, exactly, in rank s + 2.

    x, y: coordinates in s dimensions (y defaults to x). weight: one a head and query, default 1.
    Source: arXiv 2505.12044.
    """
    y = x if y is None else y
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y has {y.shape[-1]} coordinates a point, must have {x.shape[-1]} as x")
    x_norm, y_norm = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    query = torch.cat([2 * x, -x_norm, torch.ones_like(x_norm)], dim=-1)[:, None]
    key = torch.cat([y, torch.ones_like(y_norm), -y_norm], dim=-1)[:, None]
    return FactoredBias(query if weight is None else weight[..., None] * query, key)


def svd_bias(
    table: Float[Tensor, "h n m"], *, rank: int | None = None, energy: float = 0.995
) -> tuple[FactoredBias, Int[Tensor, " h"]]:
    """Factors of a learned table by singular values: B ~ (U sqrt(S)) (V sqrt(S))^T.

    Without `rank`, each head keeps the fewest singular values that hold `energy` of the sum of squares;
    heads that need fewer than the widest are filled with zeros. Returns the factors and the rank of
    each head. The error of the logits in the Frobenius norm is sqrt(sum of the dropped s^2).
    Source: arXiv 2505.12044.
    """
    most = min(table.shape[-2:])
    if rank is not None and not 1 <= rank <= most:
        raise ValueError(f"rank is {rank}, must be from 1 to {most}")
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}, must lie in (0, 1]")
    u, s, vh = torch.linalg.svd(table, full_matrices=False)
    if rank is None:
        share = s.square().cumsum(-1) / s.square().sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
        # A share may stay below 1 by rounding; no head needs more than all of them.
        ranks = ((share < energy).sum(-1) + 1).clamp(max=most)
    else:
        ranks = torch.full(table.shape[:1], rank, device=table.device)
    width = int(ranks.max())
    kept = torch.arange(width, device=table.device) < ranks[:, None]
    root = (s[:, :width] * kept).sqrt()[:, None]
    query, key = u[..., :width] * root, vh.transpose(-1, -2)[..., :width] * root
    return FactoredBias(query[None], key[None]), ranks
