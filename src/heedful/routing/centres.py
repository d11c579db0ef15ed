"""Tokens by content: centres that all images share, and windows over the tokens sorted by centre."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def reflected(n: int, total: int, device: torch.device | None = None) -> Int[Tensor, " total"]:
    """0, 1, ..., n - 1, n - 1, ..., 1, 0, 0, 1, ...: places of n tokens, turned back at the ends."""
    place = torch.arange(total, device=device) % (2 * n)
    return torch.minimum(place, 2 * n - 1 - place)


def chunk_centres(x: Float[Tensor, "b n c"], centres: int) -> Float[Tensor, "t c"]:
    """First centres: the means over the batch of `centres` runs of tokens, equally long.

    The tokens are filled up by the last ones, turned round, always by at least one.
    """
    n = x.shape[1]
    filled = x[:, reflected(n, n + centres - n % centres, x.device)]
    return filled.unflatten(1, (centres, -1)).mean((0, 2))


def nearest_centre(x: Float[Tensor, "b n c"], centres: Float[Tensor, "t c"]) -> Int[Tensor, "b n"]:
    """For each token the centre of the greatest inner product; cosine, where both have length 1."""
    with torch.autocast(x.device.type, enabled=False):
        return (x @ centres.to(x.dtype).T).argmax(-1)


def next_centres(x: Float[Tensor, "b n c"], centres: Float[Tensor, "t c"]) -> Float[Tensor, "t c"]:
    """One step: a centre becomes the sum of its tokens, of all images, at length 1; without any it stays."""
    with torch.autocast(x.device.type, enabled=False):
        owner = nearest_centre(x, centres).flatten()
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = torch.zeros_like(centres, dtype=wide).index_add(0, owner, x.flatten(0, 1).to(wide))
        count = torch.zeros_like(centres[:, 0], dtype=wide).index_add(
            0, owner, x.new_ones(len(owner)).to(wide)
        )
        return torch.where(count[:, None] > 0, F.normalize(sums, dim=-1), centres).to(centres.dtype)
