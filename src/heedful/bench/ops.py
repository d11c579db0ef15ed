"""`heedful bench ops`: what a pattern costs, beside dense attention in the same run and beside the ideal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful import patterns as p
from heedful.bench.process import fresh, peak_memory
from heedful.ops.attention import attention

BATCH, HEADS, WIDTH = 1, 4, 64
DENSE_UP_TO = 16384  # tokens; beyond, one dense pass takes minutes on two cores

Make = Callable[[int], p.Pattern]


def _square(n: int) -> tuple[int, int]:
    side = math.isqrt(n)
    if side * side != n:
        raise ValueError(f"length is {n}, must be a square for patterns on a map, e.g. 4096 or 16384")
    return side, side


PATTERNS: dict[str, Make] = {
    "window": lambda n: p.Window(256),
    "causal-window": lambda n: p.Causal() & p.Window(256),
    "window+sink": lambda n: p.Causal() & (p.Window(256) | p.Sink(4)),
    "dilated": lambda n: p.Window(64, dilation=4),
    "documents": lambda n: p.Causal() & p.Documents((n // 16,) * 16),
    "blocks-2d": lambda n: p.Blocks(_square(n), (8, 8)),
    "grid-2d": lambda n: p.Grid(_square(n), (8, 8)),
    "neighborhood-2d": lambda n: p.Neighborhood(_square(n), (13, 13)),
    "halo-2d": lambda n: p.Halo(_square(n), (8, 8), (3, 3)),
    "causal": lambda n: p.Causal(),
}


@dataclass(frozen=True)
class Point:
    """One pattern at one length. Times in seconds, memory in MiB, ratios dense / pattern.

    visited: share of visible pairs. ideal: share of the matrix in the seen blocks of a 128 x 128 table
    (or in the pattern's own groups where these are fewer); reached: how much of the speed-up 1 / ideal
    the forward pass has.
    """

    pattern: str
    length: int
    device: str
    forward: float
    both: float
    memory: float | None
    visited: float
    ideal: float
    dense_forward: float | None = None
    dense_both: float | None = None
    flex_forward: float | None = None

    @property
    def forward_ratio(self) -> float | None:
        return None if self.dense_forward is None else self.dense_forward / self.forward

    @property
    def both_ratio(self) -> float | None:
        return None if self.dense_both is None else self.dense_both / self.both

    @property
    def reached(self) -> float | None:
        return None if self.forward_ratio is None else self.forward_ratio * self.ideal

    @property
    def reached_both(self) -> float | None:
        return None if self.both_ratio is None else self.both_ratio * self.ideal

    def as_dict(self) -> dict[str, Any]:
        names = ("forward_ratio", "both_ratio", "reached", "reached_both")
        return asdict(self) | {name: getattr(self, name) for name in names}


def points(
    names: list[str], lengths: list[int], device: str = "cpu", *, flex: bool = False
) -> Iterator[Point]:
    """Measure each pattern at each length, every point in a process of its own."""
    for name in names:
        if name not in PATTERNS:
            raise ValueError(f"pattern is {name!r}, must be one of {', '.join(PATTERNS)}")
        for length in lengths:
            PATTERNS[name](length)  # an unfit length is an error at the door
    for name in names:
        for length in lengths:
            result = fresh(_measure, name, length, device, flex)
            if isinstance(result, str):
                raise RuntimeError(f"pattern {name!r} at {length} tokens: {result}")
            yield result


def _measure(name: str, length: int, device: str, flex: bool) -> Point:
    pattern = PATTERNS[name](length)
    q, k, v = (torch.randn(BATCH, HEADS, length, WIDTH, device=device, requires_grad=True) for _ in range(3))
    grad = torch.randn_like(q)

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(q, k, v, pattern=pattern)

    def both() -> object:
        return torch.autograd.grad(attention(q, k, v, pattern=pattern), (q, k, v), grad)

    def dense() -> Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, k, v)

    def dense_both() -> object:
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), grad)

    memory = peak_memory(both, device)
    repeats = 10 if length <= 16384 else 2
    times = best_times([forward, both], repeats, device)
    dense_forward: float | None = None
    dense_both_time: float | None = None
    if length <= DENSE_UP_TO:
        # Dense passes run between further passes of the pattern, so that both see the same machine.
        paired = best_times([forward, both, dense, dense_both], 2 if length > 4096 else 5, device)
        times = [min(a, b) for a, b in zip(times, paired, strict=False)]
        dense_forward, dense_both_time = paired[2:]
    flex_time = _flex(q, k, v, pattern, device) if flex else None
    groups = pattern.groups(length, length, 0, torch.device("cpu"))
    ideal = pattern.block_table(length).visited()
    if groups is not None:
        ideal = min(ideal, groups.visited())
    # Patterns on 64k tokens have 2^32 pairs; their density is that of a smaller length times a ratio we skip.
    visited = pattern.density(length) if length <= DENSE_UP_TO else math.nan
    return Point(
        name,
        length,
        device,
        times[0],
        times[1],
        memory,
        visited,
        ideal,
        dense_forward,
        dense_both_time,
        flex_time,
    )


def _flex(q: Tensor, k: Tensor, v: Tensor, pattern: p.Pattern, device: str) -> float:
    @torch.no_grad()
    def run() -> object:
        return attention(q, k, v, pattern=pattern, backend="flex")

    run()  # compiles
    return best_times([run], 5, device)[0]


def best_times(steps: list[Callable[[], object]], repeats: int, device: str) -> list[float]:
    """Shortest time of each step; the steps take turns."""
    best = [math.inf] * len(steps)
    for _ in range(repeats + 1):  # the first round warms up, but may also be the best
        for i, step in enumerate(steps):
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            best[i] = min(best[i], time.perf_counter() - start)
    return best
