"""Blocks of queries that see a margin around their block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.separable import Axis, Separable, brief, grid_shape, per_axis


@dataclass(frozen=True)
class Halo(Separable):
    """All queries of a block see the block and `halo` tokens around it, clipped at the borders.

    On every axis, with s = block * floor(q / block): s - halo <= k < s + block + halo.
    shape: lengths of the axes of the grid, flattened row-major; block and halo: one number, or one an
    axis; the last block of an axis may be cut short. ValueError unless block >= 1 and halo >= 0.
    Source: HaloNet, arXiv 2103.12731.
    """

    shape: int | Sequence[int]
    block: int | Sequence[int]
    halo: int | Sequence[int]

    def __post_init__(self) -> None:
        shape = grid_shape(self.shape)
        block = per_axis("block", self.block, len(shape))
        halo = per_axis("halo", self.halo, len(shape))
        for one, margin in zip(block, halo, strict=True):
            check_positive("block", one)
            if margin < 0:
                raise ValueError(f"halo is {margin}, must be at least 0")
        for name, value in (("shape", shape), ("block", block), ("halo", halo)):
            object.__setattr__(self, name, value)

    @property
    def axes(self) -> tuple[Axis, ...]:
        shape = grid_shape(self.shape)
        block, halo = per_axis("block", self.block, len(shape)), per_axis("halo", self.halo, len(shape))
        return tuple(_axis(*each) for each in zip(shape, block, halo, strict=True))

    def __str__(self) -> str:
        return f"Halo({brief(self.shape)}, {brief(self.block)}, {brief(self.halo)})"


def _axis(length: int, block: int, halo: int) -> Axis:
    def bounds(q: Tensor) -> tuple[Tensor, Tensor]:
        start = q - q % block
        return (start - halo).clamp(min=0), (start + block - 1 + halo).clamp(max=length - 1)

    return Axis(length, bounds, tile=block)
