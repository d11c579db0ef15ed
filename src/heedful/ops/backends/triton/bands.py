"""Masks that kernels compute by comparing positions: causal, windows, sinks and what they join to."""

from __future__ import annotations

from dataclasses import dataclass

from heedful.patterns.causal import Causal
from heedful.patterns.full import Full
from heedful.patterns.pattern import And, Or, Pattern
from heedful.patterns.sink import Sink
from heedful.patterns.sink_window import SinkWindow
from heedful.patterns.window import Window

FAR = 1 << 30  # beyond every distance between positions
_MOST = 2  # bands that a kernel compares with


@dataclass(frozen=True)
class Band:
    """Visible iff low <= k - q <= high and k < end, for positions q and k."""

    low: int = -FAR
    high: int = FAR
    end: int = FAR

    def meet(self, other: Band) -> Band:
        return Band(max(self.low, other.low), min(self.high, other.high), min(self.end, other.end))

    @property
    def empty(self) -> bool:
        return self.low > self.high or self.end <= 0


def bands(pattern: Pattern) -> tuple[Band, ...] | None:
    """One or two bands whose union is the pattern, or None if it is not made of so few."""
    found = _union(pattern)
    if found is None or len(found) > _MOST:
        return None
    return found or (Band(high=-FAR),)


def _union(pattern: Pattern) -> tuple[Band, ...] | None:
    if isinstance(pattern, Full):
        return (Band(),)
    if isinstance(pattern, Causal):
        return (Band(high=0),)
    if isinstance(pattern, Window) and pattern.dilation == 1:
        assert pattern.after is not None
        return (Band(max(-pattern.before, -FAR), min(pattern.after, FAR)),)
    if isinstance(pattern, Sink):
        return (Band(end=min(pattern.tokens, FAR)),) if pattern.tokens else ()
    if isinstance(pattern, SinkWindow):
        return (Band(1 - min(pattern.window, FAR), 0), Band(high=0, end=min(pattern.sinks, FAR)))
    if isinstance(pattern, And | Or):
        left, right = _union(pattern.left), _union(pattern.right)
        if left is None or right is None:
            return None
        joined = left + right if isinstance(pattern, Or) else [a.meet(b) for a in left for b in right]
        return tuple(dict.fromkeys(band for band in joined if not band.empty))
    return None
