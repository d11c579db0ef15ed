"""Sliding windows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.pattern import Pattern


@dataclass(frozen=True)
class Window(Pattern):
    """A query sees `before` keys before it, itself, and `after` keys after it, `dilation` apart.

    Visible iff k - q is a multiple of dilation and -before <= (k - q) / dilation <= after.
    `after` defaults to `before`.
    """

    before: int
    after: int | None = None
    dilation: int = 1
    relative = True

    def __post_init__(self) -> None:
        if self.after is None:
            object.__setattr__(self, "after", self.before)
        for name, value in (("before", self.before), ("after", self.after)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is {value!r}, must be a whole number of at least 0")
        check_positive("dilation", self.dilation)

    @property
    def exact_tiles(self) -> bool:  # type: ignore[override]
        return self.dilation == 1

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert self.after is not None
        step = k - q
        seen = (step >= -self.before * self.dilation) & (step <= self.after * self.dilation)
        return seen if self.dilation == 1 else seen & (step % self.dilation == 0)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        assert self.after is not None
        before, after = self.before * self.dilation, self.after * self.dilation
        some = (k_hi - q_lo >= -before) & (k_lo - q_hi <= after)
        every = (k_lo - q_hi >= -before) & (k_hi - q_lo <= after)
        return some, every if self.dilation == 1 else every & ~every  # never full: gaps between the keys seen

    def __str__(self) -> str:
        parts = [str(self.before)]
        if self.after != self.before:
            parts.append(str(self.after))
        if self.dilation != 1:
            parts.append(f"dilation={self.dilation}")
        return f"Window({', '.join(parts)})"
