"""Maths of foveal attention on maps: neighbours and a pooled map in one softmax, log-spaced positions."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.ops.window_views import window_views


def _axis(size: int, pooled: int, trained: int) -> tuple[tuple[float, ...], tuple[tuple[int, ...], ...]]:
    """Log-spaced offsets between places and cells of one axis, without repetition, and the index of each."""
    offsets = []
    for place in range(size):
        for cell in range(pooled):
            first, last = cell * size // pooled, -(-(cell + 1) * size // pooled)
            centre = (first + last - 1) / 2  # the mean of the places that adaptive pooling joins
            t = (place - centre) / max(1, trained - 1) * 8
            offsets.append(math.copysign(math.log2(abs(t) + 1) / 3, t))
    unique = sorted(set(offsets))
    number = {offset: i for i, offset in enumerate(unique)}
    index = [number[offset] for offset in offsets]
    return tuple(unique), tuple(tuple(index[i * pooled : (i + 1) * pooled]) for i in range(size))


def log_spaced_offsets(
    size: tuple[int, int],
    pooled: tuple[int, int],
    *,
    trained: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "u 2"], Int[Tensor, "n p"]]:
    """Offsets between the places of a map and the cells of its pooled form, each once, and which is whose.

        t = 8 (place - centre of the cell) / (trained - 1),   offset = sign(t) log2(|t| + 1) / log2(8)

    size     height and width of the map, n = height * width
    pooled   of the pooled map (adaptive average pooling), p
    trained  the size that offsets are measured in; None: `size`

    Gives table (u, 2) and index (n, p) into it. Source: TransNeXt, arXiv 2311.17132.
    """
    trained = size if trained is None else trained
    (rows, row_of), (columns, column_of) = (_axis(*axis) for axis in zip(size, pooled, trained, strict=True))
    table = torch.cartesian_prod(
        *(torch.tensor(part, device=device, dtype=dtype) for part in (rows, columns))
    )
    i, j = (torch.tensor(part, device=device) for part in (row_of, column_of))
    index = i[:, None, :, None] * len(columns) + j[None, :, None, :]
    return table, index.flatten(2).flatten(0, 1)


def inside(size: tuple[int, int], window: int, device: torch.device | str | None) -> Bool[Tensor, "n w"]:
    """Which neighbours, in a window of odd side, stand inside of the map; row by row."""
    views = window_views(torch.ones(size, device=device), (window, window))
    return torch.stack([view.flatten() > 0 for view in views], dim=1)


def foveal_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n d"],
    pooled_key: Float[Tensor, "b h p d"],
    pooled_value: Float[Tensor, "b h p d"],
    *,
    size: tuple[int, int],
    window: int,
    local_bias: Float[Tensor, "h w"],
    pooled_bias: Float[Tensor, "h n p"],
    extra: Float[Tensor, "b h n w"],
) -> Float[Tensor, "b h n d"]:
    """One softmax over the neighbours of a place and over the cells of a pooled map.

        a = softmax([q_i . k_j + local_bias, q_i . k'_p + pooled_bias])
        y_i = sum_j (a_ij + extra_ij) v_j + sum_p a_ip v'_p

    Queries are already scaled. Neighbours outside of the map take no part. n x (w + p) logits are held.
    Source: TransNeXt, arXiv 2311.17132.
    """
    kernel, places = (window, window), query.unflatten(2, size)
    near_keys = window_views(key.unflatten(2, size), kernel, channels_last=True)
    local = torch.stack([(places * there).sum(-1) for there in near_keys], dim=-1).flatten(2, 3)
    local = (local + local_bias[:, None]).masked_fill(~inside(size, window, query.device), -torch.inf)
    pooled = query @ pooled_key.mT + pooled_bias
    weight = torch.cat([local, pooled], dim=-1).softmax(-1).to(value.dtype)
    near, far = weight.split([local.shape[-1], pooled.shape[-1]], dim=-1)
    near = (near + extra.to(near.dtype)).unflatten(2, size)
    out = (far @ pooled_value).unflatten(2, size)
    near_values = window_views(value.unflatten(2, size), kernel, channels_last=True)
    for share, there in zip(near.unbind(-1), near_values, strict=True):
        out = torch.addcmul(out, share[..., None], there)
    return out.flatten(2, 3)
