"""Non-overlapping windows on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.separable import Axis, Separable, brief, grid_shape, per_axis


@dataclass(frozen=True)
class Blocks(Separable):
    """A query sees the block it is in: floor((q - shift) / size) = floor((k - shift) / size) on every axis.

    shape: lengths of the axes of the grid, flattened row-major; size and shift: one number, or one an
    axis. Borders lie at shift, shift + size, ...; blocks at the ends of an axis may be cut short. With a
    shift of half the size these are the shifted windows of Swin, whose wrapped parts do not see each
    other. ValueError unless size >= 1 and 0 <= shift < size.
    """

    shape: int | Sequence[int]
    size: int | Sequence[int]
    shift: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        shape = grid_shape(self.shape)
        size = per_axis("size", self.size, len(shape))
        shift = per_axis("shift", self.shift, len(shape))
        for one, moved in zip(size, shift, strict=True):
            check_positive("size", one)
            if not 0 <= moved < one:
                raise ValueError(f"shift is {moved}, must be at least 0 and less than size, which is {one}")
        for name, value in (("shape", shape), ("size", size), ("shift", shift)):
            object.__setattr__(self, name, value)

    @property
    def axes(self) -> tuple[Axis, ...]:
        shape = grid_shape(self.shape)
        size, shift = per_axis("size", self.size, len(shape)), per_axis("shift", self.shift, len(shape))
        return tuple(_axis(*each) for each in zip(shape, size, shift, strict=True))

    def __str__(self) -> str:
        shift = f", shift={brief(self.shift)}" if any(a.phase for a in self.axes) else ""
        return f"Blocks({brief(self.shape)}, {brief(self.size)}{shift})"


def _axis(length: int, size: int, shift: int) -> Axis:
    phase = (size - shift) % size

    def bounds(q: Tensor) -> tuple[Tensor, Tensor]:
        start = q - (q + phase) % size
        return start.clamp(min=0), (start + size - 1).clamp(max=length - 1)

    return Axis(length, bounds, tile=size, phase=phase)
