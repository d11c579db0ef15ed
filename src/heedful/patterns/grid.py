"""Groups of tokens spread uniformly over a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.checks import check_divides
from heedful.patterns.separable import Axis, Separable, brief, grid_shape, per_axis


@dataclass(frozen=True)
class Grid(Separable):
    """A query sees the `grid` tokens an axis that lie `shape / grid` apart: q = k modulo shape / grid.

    shape: lengths of the axes of the grid of tokens, flattened row-major; grid: one number, or one an
    axis. ValueError unless grid divides the length of its axis.
    Source: grid attention of MaxViT, arXiv 2204.01697.
    """

    shape: int | Sequence[int]
    grid: int | Sequence[int]

    def __post_init__(self) -> None:
        shape = grid_shape(self.shape)
        grid = per_axis("grid", self.grid, len(shape))
        for one, length in zip(grid, shape, strict=True):
            check_divides("grid", one, "the length of its axis", length)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "grid", grid)

    @property
    def axes(self) -> tuple[Axis, ...]:
        shape = grid_shape(self.shape)
        grid = per_axis("grid", self.grid, len(shape))
        return tuple(_axis(*each) for each in zip(shape, grid, strict=True))

    def __str__(self) -> str:
        return f"Grid({brief(self.shape)}, {brief(self.grid)})"


def _axis(length: int, grid: int) -> Axis:
    def bounds(q: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), torch.full_like(q, length - 1)

    return Axis(length, bounds, tile=grid, step=length // grid)
