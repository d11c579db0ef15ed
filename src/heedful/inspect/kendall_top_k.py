"""Kendall's tau of the tops of two rankings, ties included."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.registry import register


@register("kendall-top-k", kind="inspect", paper="song-of-disagreement", tags=("agreement",))
def kendall_top_k(
    a: Float[Tensor, " n"], b: Float[Tensor, " n"], k: int | float | str | None = None, *, p: float = 0.5
) -> tuple[float, int]:
    """(tau, k): how alike the k highest of two lists of scores are ordered, 1 the same, -1 the reverse.

        tau = 1 - 2 penalty / pairs

    Over the pairs of an item in the top of a and another in the top of b: penalty 1 where the lists order
    them oppositely, p where one list alone ties them. The top of a list are its k highest values with all
    items that have them, so that with ties more than k items enter.

    k  a number of values; a share of n, as a float; "nonzero", the smaller number of scores that are not 0;
       None, all
    p  the penalty for a tie

    Raises ValueError if k is none of these. Source: Fagin et al. 2004; arXiv 2205.04559.
    """
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"a and b have shapes {tuple(a.shape)} and {tuple(b.shape)}, must be one shape (n,)")
    count = _count(a, b, k)
    x, y = (torch.sign(v[:, None] - v).int() for v in (a, b))
    pairs = _top(a, count)[:, None] & _top(b, count)
    pairs = (pairs | pairs.T).triu(1)  # unordered, i != j
    opposite, tied = (x * y == -1) & pairs, ((x == 0) != (y == 0)) & pairs
    penalty = int(opposite.sum()) + p * int(tied.sum())
    return 1 - 2 * penalty / max(1, int(pairs.sum())), count


def _count(a: Tensor, b: Tensor, k: int | float | str | None) -> int:
    n = len(a)
    if k is None:
        return n
    if k == "nonzero":
        return int(min(a.count_nonzero(), b.count_nonzero()))
    if isinstance(k, float) and 0 < k <= 1:
        return max(1, int(k * n))
    if isinstance(k, int) and not isinstance(k, bool) and k >= 1:
        return k
    raise ValueError(f"k is {k!r}, must be a whole number from 1, a share in (0, 1], 'nonzero' or None")


def _top(scores: Tensor, count: int) -> Tensor:
    """Whether an item has one of the `count` highest values."""
    values = scores.unique()  # ascending
    if count == 0 or len(values) == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores >= values[max(0, len(values) - count)]
