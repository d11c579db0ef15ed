"""Tokens of single channels: one projection for all, positions that channels share, sampling of channels."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class ChannelPatches(nn.Module):
    """The patches of one channel as tokens, t = W patch + b, with the same W and b for every channel.

    What patches do not fill of an image (right, bottom) is cut off.
    """

    def __init__(self, dim: int, *, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(1, dim, patch, stride=patch)

    def size(self, x: Tensor) -> tuple[int, int]:
        """Patches of an image along height and width; a ValueError if it is smaller than one."""
        height, width = x.shape[-2:]
        if min(height, width) < self.patch:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, height and width must be at least {self.patch}, a patch"
            )
        return height // self.patch, width // self.patch

    def forward(self, x: Float[Tensor, "s height width"]) -> Float[Tensor, "s p d"]:
        return self.proj(x[:, None]).flatten(2).transpose(1, 2)


def stretch_table(table: Float[Tensor, "old d"], side: int, size: tuple[int, int]) -> Float[Tensor, "new d"]:
    """A table of positions of a side x side grid at another size, as DINO resizes it.

    The step of the bicubic interpolation is side / (n + 0.1) instead of side / n, so that the table changes
    a little even where the size is its own. (`F.interpolate` knows that step, but its gradient is that of a
    copy where the size is its own.)
    """
    rows, columns = (_steps(n, side).to(table.device, table.dtype) for n in size)
    grid = table.unflatten(0, (side, side))
    return torch.einsum("ia,jb,abd->ijd", rows, columns, grid).flatten(0, 1)


def _steps(n: int, side: int) -> Float[Tensor, "n side"]:
    """Weights of the `side` old places in each of the n new ones, along one axis."""
    place = (torch.arange(n, dtype=torch.float64) + 0.5) * side / (n + 0.1) - 0.5
    source = place.floor()[:, None] + torch.arange(-1, 3)
    t = (place[:, None] - source).abs()
    near, far = (1.25 * t - 2.25) * t * t + 1, -0.75 * (((t - 5) * t + 8) * t - 4)
    weights = torch.zeros(n, side, dtype=torch.float64)
    return weights.scatter_add(1, source.long().clamp(0, side - 1), torch.where(t <= 1, near, far))


def sample_channels(
    x: Float[Tensor, "b c height width"], channels: Int[Tensor, "b c"]
) -> tuple[Float[Tensor, "b m height width"], Int[Tensor, "b m"]]:
    """Hierarchical channel sampling: a random subset of the channels, the same for the whole batch.

        m ~ Uniform{1..c},  then m of the c channels without replacement, in random order

    x         images
    channels  the identities of their channels

    Source: Channel Vision Transformers, arXiv 2309.16108.
    """
    count = x.shape[1]
    kept = torch.randperm(count, device=x.device)[: int(torch.randint(1, count + 1, ()))]
    return x[:, kept], channels[:, kept]
