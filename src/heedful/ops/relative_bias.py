"""Biases of relative position on a grid, as Swin-like models learn them, and their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heedful.checks import check_positive
from heedful.ops.bias import FactoredBias, svd_bias


def relative_index(shape: Sequence[int]) -> Int[Tensor, "n n"]:
    """Which row of a Swin-like table stands for (query, key), on a grid flattened row by row.

    Rows run over the offsets query - key, from 1 - side to side - 1 on each axis, the last axis fastest.
    """
    for side in shape:
        check_positive("shape", side)
    index = torch.zeros(1, 1, dtype=torch.int64)
    for side in shape:
        place = torch.arange(side)
        step = place[:, None] - place + side - 1
        joined = index[:, None, :, None] * (2 * side - 1) + step[None, :, None, :]
        index = joined.flatten(2).flatten(0, 1)
    return index


def relative_bias(table: Float[Tensor, "rows h"], shape: Sequence[int]) -> Float[Tensor, "h n n"]:
    """The bias of each pair in a window: B[h, i, j] = table[offset of i from j, h].

    table: (2 side - 1) rows an axis, multiplied; shape: sides of the window, e.g. (24, 24).
    ValueError if the table has another number of rows. Source: Swin Transformer, arXiv 2103.14030.
    """
    index = relative_index(shape).to(table.device)
    rows = math.prod(2 * side - 1 for side in shape)
    if table.shape[0] != rows:
        raise ValueError(f"table has {table.shape[0]} rows, must have {rows} for a window {tuple(shape)}")
    return table[index].permute(2, 0, 1)


def compressed_bias(
    bias: Float[Tensor, "h n m"], *, energy: float = 0.995, max_rank: int = 16
) -> FactoredBias | Float[Tensor, "h n m"]:
    """The factors of a trained bias where few will do, else the bias as it is.

    Each head needs as many singular values as hold `energy` of its sum of squares; where some head needs
    more than `max_rank`, factors would cost more than they save. `heedful.attention` takes either.
    Source: FlashBias, arXiv 2505.12044.
    """
    check_positive("max_rank", max_rank)
    factors, ranks = svd_bias(bias, energy=energy)
    return factors if int(ranks.max()) <= max_rank else bias
