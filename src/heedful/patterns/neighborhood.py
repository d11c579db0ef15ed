"""Sliding windows on grids that keep their size at the borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.separable import Axis, Separable, brief, even_tile, grid_shape, per_axis
from heedful.registry import register

_TILE = {1: 128, 2: 8}  # queries of a group along an axis, by the number of axes
_TILE_3D = 4
_WHOLE_TILE = 16  # along an axis that is seen whole


@register("neighborhood", kind="pattern", paper="gna", tags=("sparse", "local", "window"))
@dataclass(frozen=True)
class Neighborhood(Separable):
    """A query sees the `window` nearest keys on every axis; windows move inward at the borders.

    On each axis, among the n tokens of q's residue modulo dilation, with local coordinates a of the query
    and b of the key, w = window and s = stride:
      leader L = min(s floor(a / s) + floor(s / 2), n - 1)
      start    = min(max(L - floor(w / 2), 0), n - w),  visible iff start <= b < start + w
    and on a causal axis
      leader L = min(s floor(a / s) + s - 1, n - 1),    visible iff L - w < b <= a.
    Visible iff visible on every axis. stride 1 is neighborhood attention, stride = window is attention
    in blocks, window = axis is full attention.

    shape: lengths of the axes of the grid, flattened row-major; window, stride, dilation and causal: one
    value, or one an axis. window counts tokens of a residue. ValueError unless window * dilation is at
    most the length of the axis and 1 <= stride <= window.
    Sources: arXiv 2204.07143, 2209.15001, 2403.04690; stride: arXiv 2504.16922.
    """

    example: ClassVar[dict[str, Any]] = {"shape": (6, 6), "window": 3}

    shape: int | Sequence[int]
    window: int | Sequence[int]
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1
    causal: bool | Sequence[bool] = False

    def __post_init__(self) -> None:
        shape = grid_shape(self.shape)
        window = per_axis("window", self.window, len(shape))
        stride = per_axis("stride", self.stride, len(shape))
        dilation = per_axis("dilation", self.dilation, len(shape))
        causal = per_axis("causal", self.causal, len(shape))
        for length, w, s, d in zip(shape, window, stride, dilation, strict=True):
            check_positive("window", w)
            check_positive("stride", s)
            check_positive("dilation", d)
            if w * d > length:
                raise ValueError(
                    f"window is {w} and dilation {d}, their product must be at most {length}, "
                    "the length of the axis"
                )
            if s > w:
                raise ValueError(f"stride is {s}, must be at most window, which is {w}")
        for name, value in (
            ("shape", shape),
            ("window", window),
            ("stride", stride),
            ("dilation", dilation),
            ("causal", causal),
        ):
            object.__setattr__(self, name, value)

    @property
    def axes(self) -> tuple[Axis, ...]:
        shape = grid_shape(self.shape)
        window, stride, dilation = (
            per_axis("", value, len(shape)) for value in (self.window, self.stride, self.dilation)
        )
        causal = per_axis("causal", self.causal, len(shape))
        target = _TILE.get(len(shape), _TILE_3D)
        return tuple(
            _axis(*each, target) for each in zip(shape, window, stride, dilation, causal, strict=True)
        )

    @property
    def gathers(self) -> bool:
        # A plain window in one dimension is a band, and a block table serves it best.
        axes = self.axes
        return len(axes) > 1 or axes[0].step > 1 or per_axis("stride", self.stride, 1)[0] > 1

    def __str__(self) -> str:
        parts = [brief(self.shape), brief(self.window)]
        for name, value in (("stride", self.stride), ("dilation", self.dilation)):
            if value not in (1, (1,) * len(self.axes)):
                parts.append(f"{name}={brief(value)}")
        if any(per_axis("causal", self.causal, len(self.axes))):
            parts.append(f"causal={self.causal}")
        return f"Neighborhood({', '.join(parts)})"


def _axis(length: int, window: int, stride: int, dilation: int, causal: bool, target: int) -> Axis:
    def bounds(q: Tensor) -> tuple[Tensor, Tensor]:
        residue, a = q % dilation, q // dilation
        n = length // dilation + (residue < length % dilation)  # tokens of this residue
        if causal:
            leader = (a - a % stride + stride - 1).minimum(n - 1)
            first, last = (leader - window + 1).clamp(min=0), a
        else:
            leader = (a - a % stride + stride // 2).minimum(n - 1)
            first = (leader - window // 2).clamp(min=0).minimum(n - window)
            last = first + window - 1
        return first * dilation + residue, last * dilation + residue

    longest = -(-length // dilation)
    whole = window == length and not causal
    # Where all see all, a larger group has no more keys.
    target = max(target, _WHOLE_TILE) if whole else target
    return Axis(length, bounds, even_tile(longest, target, stride), dilation, whole=whole)
