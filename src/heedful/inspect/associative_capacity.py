"""How many pairs of keys and values a linear memory holds before they disturb each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_positive
from heedful.registry import register

ROWS = 1024  # keys whose cosines with all others are held at once


def signal_to_interference(
    keys: Float[Tensor, "*h n d"], values: Float[Tensor, "*h n e"]
) -> Float[Tensor, "*h n"]:
    """How far each pair stands out when its key asks a memory of all pairs, S = sum_j v_j k_j^T.

        S k_j = |k_j|^2 v_j + sum_(i != j) (k_i . k_j) v_i
        SIR_j = |k_j|^2 |v_j| / |sum_(i != j) (k_i . k_j) v_i|

    inf where nothing disturbs. Source: arXiv 2508.08289.
    """
    _check(keys, values)
    signal = keys.square().sum(-1, keepdim=True) * values
    interference = keys @ (keys.mT @ values) - signal
    return signal.norm(dim=-1) / interference.norm(dim=-1)


def effective_rank(keys: Float[Tensor, "*h n d"]) -> Float[Tensor, "*h"]:
    """exp of the entropy of the singular values, divided by their sum: the directions that keys use."""
    share = torch.linalg.svdvals(keys)
    share = share / share.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


def mean_cosine(keys: Float[Tensor, "*h n d"]) -> Float[Tensor, "*h"]:
    """The mean of |cos| over all pairs of different keys."""
    n = keys.shape[-2]
    if n < 2:
        return keys.new_zeros(keys.shape[:-2])
    unit = torch.nn.functional.normalize(keys, dim=-1)
    total = sum((part @ unit.mT).abs().sum((-2, -1)) for part in unit.split(ROWS, dim=-2))
    return (total - unit.square().sum((-2, -1))) / (n * (n - 1))


@dataclass(frozen=True)
class AssociativeCapacity:
    """What `associative_capacity` finds; one number a head.

    sir             signal to interference of every pair, (*h, n)
    capacity        pairs at which the power of the interference would equal that of the signal
    effective_rank  directions that the keys use
    mean_cosine     mean |cos| between keys
    average_bound   d, the order of pairs recalled on average
    safe_bound      sqrt(d), the order of pairs recalled without error
    """

    sir: Float[Tensor, "*h n"]
    capacity: Float[Tensor, "*h"]
    effective_rank: Float[Tensor, "*h"]
    mean_cosine: Float[Tensor, "*h"]
    average_bound: float
    safe_bound: float

    def __str__(self) -> str:
        n = self.sir.shape[-1]
        rows = [
            f"{n} pairs; orders: {self.average_bound:g} on average, {self.safe_bound:.3g} without error",
            "The theory is of linear attention: softmax separates keys better than it says.",
        ]
        quartiles = self.sir.reshape(-1, n).quantile(self.sir.new_tensor([0.25, 0.5, 0.75]), dim=-1).T
        parts = (self.capacity, self.effective_rank, self.mean_cosine)
        numbers = zip(quartiles.tolist(), *(part.reshape(-1).tolist() for part in parts), strict=True)
        rows += [
            f"head {head}: SIR {low:.3g} / {middle:.3g} / {high:.3g} (quartiles), capacity {capacity:.4g}, "
            f"rank {rank:.3g}, |cos| {cosine:.3g}"
            for head, ((low, middle, high), capacity, rank, cosine) in enumerate(numbers)
        ]
        return "\n".join(rows)


@register("associative-capacity", kind="inspect", paper="pavlovian", tags=("memory", "linear"))
def associative_capacity(
    keys: Float[Tensor, "*h n d"], values: Float[Tensor, "*h n e"]
) -> AssociativeCapacity:
    """How well a linear memory tells the pairs of a layer apart, head by head, and how many it would hold.

    The power of the interference grows with the number of pairs, so that from the mean over pairs

        capacity = 1 + (n - 1) / mean_j(SIR_j^-2)

    which is d + 1 for random unit keys and inf where nothing disturbs, as for orthogonal keys.
    keys and values: of one layer, at least 2 pairs. Raises ValueError if shapes do not fit.
    Source: arXiv 2508.08289; the estimate is heedful's.
    """
    _check(keys, values)
    n, d = keys.shape[-2:]
    if n < 2:
        raise ValueError(f"keys has {n} keys, must have at least 2")
    sir = signal_to_interference(keys, values)
    return AssociativeCapacity(
        sir=sir,
        capacity=1 + (n - 1) / sir.pow(-2).mean(-1),
        effective_rank=effective_rank(keys),
        mean_cosine=mean_cosine(keys),
        average_bound=float(d),
        safe_bound=math.sqrt(d),
    )


def propagated_error(error: float, layers: int, *, heads: int = 1) -> float:
    """The relative error after `layers` layers that each add their own, averaged over redundant heads.

        e' = 1 - (1 - e / sqrt(heads))^layers

    error: of one head of one layer, from 0 to 1. Raises ValueError otherwise, and unless layers and heads are
    at least 1. Source: arXiv 2508.08289 for the trade; the formula is heedful's.
    """
    check_positive("layers", layers)
    check_positive("heads", heads)
    if not 0.0 <= error <= 1.0:
        raise ValueError(f"error is {error}, must be from 0 to 1")
    return 1 - (1 - error / math.sqrt(heads)) ** layers


def _check(keys: Tensor, values: Tensor) -> None:
    if keys.ndim < 2 or values.shape[:-1] != keys.shape[:-1]:
        raise ValueError(
            f"keys has shape {tuple(keys.shape)} and values {tuple(values.shape)}, must be (*, n, d) and "
            "(*, n, e) with the same beginning"
        )
