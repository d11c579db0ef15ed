"""A given number of windows along each axis, as even as can be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from heedful.checks import check_positive
from heedful.patterns.cut import Cut
from heedful.patterns.separable import Separable, brief, grid_shape, per_axis
from heedful.registry import register


@register("split-windows", kind="pattern", paper="ultragen", tags=("sparse", "local", "window", "video"))
@dataclass(frozen=True)
class SplitWindows(Separable):
    """A query sees the window it is in, where an axis of n tokens is split into `windows` windows.

    As `torch.tensor_split` does it: the first n mod windows of them have floor(n / windows) + 1 tokens, the
    others floor(n / windows).

    shape: lengths of the axes of the grid, flattened row-major; windows: one number, or one an axis (1 leaves
    an axis whole). ValueError unless windows is at least 1.
    Source: UltraGen, arXiv 2510.18775.
    """

    example: ClassVar[dict[str, Any]] = {"shape": (2, 5, 6), "windows": (1, 2, 2)}

    shape: int | Sequence[int]
    windows: int | Sequence[int]

    def __post_init__(self) -> None:
        shape = grid_shape(self.shape)
        windows = per_axis("windows", self.windows, len(shape))
        for count in windows:
            check_positive("windows", count)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "windows", windows)

    @property
    def axes(self) -> tuple[Cut, ...]:  # type: ignore[override]  # an axis in all that Separable asks of it
        shape = grid_shape(self.shape)
        windows = per_axis("windows", self.windows, len(shape))
        return tuple(_cut(length, count) for length, count in zip(shape, windows, strict=True))

    def __str__(self) -> str:
        return f"SplitWindows({brief(self.shape)}, {brief(self.windows)})"


def _cut(length: int, count: int) -> Cut:
    small, larger = divmod(length, count)
    sizes = [small + 1] * larger + [small] * (count - larger)
    return Cut(length, tuple(itertools.accumulate(sizes[:-1])), count)
