"""Windows in space that move inward at the borders, over all frames of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from heedful.patterns.neighborhood import Neighborhood
from heedful.patterns.separable import Axis, Separable, brief, grid_shape, per_axis
from heedful.registry import register


@register("inward-window", kind="pattern", paper="freeswim", tags=("sparse", "local", "window", "video"))
@dataclass(frozen=True)
class InwardWindow(Separable):
    """A query sees, in every frame, the (2 half + 1)-wide window around its place, moved inward at borders.

    On an axis of space of length n, with d = half, below = max(d - q, 0), beyond = max(d + q - n + 1, 0):
      visible iff q - d - beyond <= k <= q + d + below
    so that a window never shrinks; an axis no longer than the window is seen whole. It is neighborhood
    attention with windows of 2 d + 1 in space and of all frames in time.

    shape: (frames, height, width), or any number of axes after the frames; half: one number, or one an axis
    of space. ValueError unless half is at least 0.
    Source: FreeSwim, arXiv 2511.14712.
    """

    example: ClassVar[dict[str, Any]] = {"shape": (2, 5, 6), "half": 1}

    shape: Sequence[int]
    half: int | Sequence[int]

    def __post_init__(self) -> None:
        shape = grid_shape(self.shape)
        half = per_axis("half", self.half, len(shape) - 1)
        for one in half:
            if not isinstance(one, int) or one < 0:
                raise ValueError(f"half is {one!r}, must be a whole number of at least 0")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "half", half)

    @property
    def axes(self) -> tuple[Axis, ...]:
        frames, *space = grid_shape(self.shape)
        half = per_axis("half", self.half, len(space))
        window = [min(2 * d + 1, length) for d, length in zip(half, space, strict=True)]
        return Neighborhood((frames, *space), (frames, *window)).axes

    def __str__(self) -> str:
        return f"InwardWindow({brief(self.shape)}, {brief(self.half)})"
