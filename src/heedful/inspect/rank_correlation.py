"""How alike two lists of scores rank the same things."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.registry import register


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"a and b have shapes {tuple(a.shape)} and {tuple(b.shape)}, must be one shape (n,)")
    return a.detach().cpu().double(), b.detach().cpu().double()


def _correlation(products: Tensor, a: Tensor, b: Tensor) -> float:
    """Products over the root of squares; 0 where one list is constant, which tells of no agreement."""
    size = (a.sum() * b.sum()).sqrt()
    return float(products.sum() / size) if size > 0 else 0.0


def _weighted_tau(a: Tensor, b: Tensor, weight: Tensor) -> float:
    x, y = (torch.sign(v[:, None] - v) for v in (a, b))
    return _correlation(weight * x * y, weight * x.square(), weight * y.square())


@register("kendall-tau", kind="inspect", paper="song-of-disagreement", tags=("agreement",))
def kendall_tau(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Kendall's tau-b: pairs in the same order less pairs in opposite order, of those that are not tied.

        (P - Q) / sqrt((N - T_a) (N - T_b)),   N all pairs, T_a those tied in a

    0 where one list is constant.
    """
    a, b = _pair(a, b)
    return _weighted_tau(a, b, torch.ones(len(a), len(a), dtype=torch.float64))


def weighted_kendall_tau(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Kendall's tau in which exchanges near the top cost more: pair (i, j) weighs 1/(1 + r_i) + 1/(1 + r_j).

    r is the rank from 0 by descending a, ties by b, and in a second tau the other way round; their mean.
    0 where one list is constant. Source: Vigna, arXiv 1404.3325.
    """
    a, b = _pair(a, b)
    both = []
    for first, second in ((a, b), (b, a)):
        order = second.argsort(descending=True, stable=True)
        order = order[first[order].argsort(descending=True, stable=True)]
        own = 1 / (1 + order.argsort().double())
        both.append(_weighted_tau(a, b, own[:, None] + own))
    return sum(both) / 2


def pearson(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Pearson's correlation: the cosine of the lists less their means. 0 where one list is constant."""
    a, b = (x - x.mean() for x in _pair(a, b))
    tiny = torch.finfo(torch.float64).eps ** 2 * len(a)
    a, b = (x if x.square().mean() > tiny * x.abs().max() ** 2 else torch.zeros_like(x) for x in (a, b))
    return _correlation(a * b, a.square(), b.square())


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Pearson's correlation of the ranks, tied ones at the mean of their places."""
    a, b = _pair(a, b)
    return pearson(_places(a), _places(b))


def _places(x: Tensor) -> Tensor:
    """Places from 1 in ascending order; tied entries share the mean of theirs."""
    below, same = (x[:, None] > x).sum(1), (x[:, None] == x).sum(1)
    return below + (same + 1) / 2.0
