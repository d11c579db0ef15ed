"""The best of all keys that came before, at every position, without a table of queries and keys.

Keys are told apart by their rank, so that of equal scores the later counts as the better. What a query sees
is then a comparison of two numbers: the rank of the key with `floor`, the worst rank that is still kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STEP = 64  # positions looked at in one go


def ranks(
    scores: Float[Tensor, "*rows m"], mask: Bool[Tensor, "*rows2 m"] | None = None
) -> tuple[Int[Tensor, "*rows m"], Int[Tensor, "*rows m"]]:
    """The rank of each key, and the key of each rank.

    Ranks are greater for greater scores and, of equal ones, for later keys.
    mask: True = may be kept; other keys have the rank -1.
    """
    scores = scores.detach()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    order = scores.sort(dim=-1, stable=True).indices
    number = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, number)
    return (rank if mask is None else rank.masked_fill(~mask, -1)), order


def best_before(
    rank: Int[Tensor, "*rows m"], keep: int, start: int
) -> Iterator[tuple[int, Int[Tensor, "*rows keep"]]]:
    """For positions start, start + STEP, ...: the `keep` best ranks before it, best first; -1 fills up."""
    m = rank.shape[-1]
    best = rank.new_full((*rank.shape[:-1], keep), -1)
    best = torch.cat([best, rank[..., :start]], -1).topk(keep, dim=-1).values
    for a in range(start, m, STEP):
        yield a, best
        best = torch.cat([best, rank[..., a : a + STEP]], -1).topk(keep, dim=-1).values


def floor(best: Int[Tensor, "*rows #n keep"], new: Int[Tensor, "*rows #n s"]) -> Int[Tensor, "*rows n"]:
    """The worst rank, at least 0, that query i keeps of `best` and the first i + 1 of the s keys `new`."""
    keep, s = best.shape[-1], new.shape[-1]
    # Each new key drops at most one: the worst that is kept then is new, or among the last s + 1 of the best.
    last = best[..., max(0, keep - s - 1) :].expand(*best.shape[:-2], s, -1)
    later = torch.ones(s, s, dtype=torch.bool, device=new.device).triu(1)
    both = torch.cat([last, new.expand(*new.shape[:-2], s, s).masked_fill(later, -1)], dim=-1)
    return both.kthvalue(s + 1, dim=-1).values.clamp(min=0)
