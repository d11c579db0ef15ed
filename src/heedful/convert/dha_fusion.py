"""Linear fusion of heads: members of a group become alike, step by step, until one can stand for all."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def fuse_heads(
    weight: Float[Tensor, "h d c"], ratios: Float[Tensor, "h h"], group: Int[Tensor, " h"]
) -> Float[Tensor, "h d c"]:
    """Every head as a combination of the heads of its group: W~_i = sum_m ratios_im W_m, m in the group of i.

    weight  the rows of a key or value projection, head by head, before any rotary embedding
    ratios  the identity gives the heads as they are; 1 / size of the group everywhere, their mean
    group   the group of each head; ratios across groups have no effect

    Raises ValueError if the shapes do not fit. Source: DHA, arXiv 2406.06567; the formula is ours.
    """
    _check(weight, group)
    if ratios.shape != (len(weight), len(weight)):
        raise ValueError(f"ratios has shape {tuple(ratios.shape)}, must be ({len(weight)}, {len(weight)})")
    return torch.einsum("im,mdc->idc", ratios * (group[:, None] == group), weight)


def fusion_loss(fused: Float[Tensor, "h d c"], group: Int[Tensor, " h"]) -> Float[Tensor, ""]:
    """How far the members of each group are apart: sum over pairs i < j of a group of |W~_i - W~_j|^2.

    For a group with the mean M it is size * sum_i |W~_i - M|^2. Source: DHA, arXiv 2406.06567; formula ours.
    """
    _check(fused, group)
    mean = merge_groups(fused, group)[group]
    size = torch.bincount(group)[group].to(fused.dtype)
    return (size * (fused - mean).square().sum((1, 2))).sum()


def merge_groups(fused: Float[Tensor, "h d c"], group: Int[Tensor, " h"]) -> Float[Tensor, "g d c"]:
    """One head for each group, the mean of its members; where `fusion_loss` is 0 nothing is lost.

    The groups are 0, 1, ... with none left out; `group` is then the map of `DecoupledHeadAttention`.
    Source: DHA, arXiv 2406.06567.
    """
    _check(fused, group)
    size = torch.bincount(group)
    total = fused.new_zeros(len(size), *fused.shape[1:]).index_add(0, group, fused)
    return total / size[:, None, None].to(fused.dtype)


def lagrangian(
    loss: Float[Tensor, ""], target: float, linear: Float[Tensor, ""], square: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """The price of missing a target: linear (loss - target) + square / 2 (loss - target)^2.

    Weights of the model and ratios go down this slope, the two multipliers up it, while the target falls from
    the loss at the start to 0. Source: DHA, arXiv 2406.06567; the formula is ours.
    """
    missed = loss - target
    return linear * missed + square / 2 * missed.square()


def _check(weight: Tensor, group: Tensor) -> None:
    if group.shape != weight.shape[:1]:
        raise ValueError(f"group has shape {tuple(group.shape)}, must be ({len(weight)},), one for each head")
    if set(group.tolist()) != set(range(int(group.max()) + 1)):
        raise ValueError(f"group is {group.tolist()}, must name groups 0, 1, ... with none left out")
