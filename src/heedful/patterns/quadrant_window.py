"""Four windows of half the height and half the width, shifted, that wrap around the map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from heedful.checks import check_choice
from heedful.patterns.cut import Cut
from heedful.patterns.separable import Separable, brief, grid_shape
from heedful.registry import register


@register("quadrant-window", kind="pattern", paper="hidiffusion", tags=("sparse", "window"))
@dataclass(frozen=True)
class QuadrantWindow(Separable):
    """A query sees the window it is in, of four that share a map; the map is a torus under the shift.

    With windows of w = (height / 2, width / 2) tokens and moved = shift * floor(w / 4), on both axes:
      visible iff floor((q - moved) mod 2w / w) = floor((k - moved) mod 2w / w)
    Parts of a window that lie at opposite borders do see each other, unlike in Swin. Where floor(w / 4) is 0
    for the height nothing moves, on neither axis, as published.

    shape: (height, width), both even; shift: 0 to 3 quarters of a window. ValueError otherwise.
    Source: HiDiffusion, arXiv 2311.17528.
    """

    example: ClassVar[dict[str, Any]] = {"shape": (8, 8), "shift": 1}

    shape: Sequence[int]
    shift: int = 0

    def __post_init__(self) -> None:
        shape = grid_shape(self.shape)
        if len(shape) != 2 or any(length % 2 for length in shape):
            raise ValueError(f"shape is {shape}, must be (height, width), both even")
        check_choice("shift", self.shift, (0, 1, 2, 3))
        object.__setattr__(self, "shape", shape)

    @property
    def moved(self) -> tuple[int, int]:
        """By how many tokens the windows are moved down and to the right."""
        down, right = (length // 2 // 4 * self.shift for length in self.shape)
        return (down, right) if down else (0, 0)

    @property
    def axes(self) -> tuple[Cut, ...]:  # type: ignore[override]  # an axis in all that Separable asks of it
        return tuple(
            Cut(length, (moved, moved + length // 2), 2)
            for length, moved in zip(self.shape, self.moved, strict=True)
        )

    def __str__(self) -> str:
        return f"QuadrantWindow({brief(self.shape)}, shift={self.shift})"
