"""`heedful bench ops --mechanisms`: what whole mixers cost, beside dense attention of the same width."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from heedful.bench.ops import best_times
from heedful.bench.process import fresh, peak_memory
from heedful.mixers.mixer import Mixer
from heedful.ops.observe import observe
from heedful.registry import find, index

DIM, HEADS = 256, 4
LENGTHS = (2048, 8192, 32768)


@dataclass(frozen=True)
class Cost:
    """One mixer at one length. Times in seconds, memory in MiB.

    visited: share of the pairs of dense attention that the mixer's attention calls compute, or None where
    it makes none; its inverse is the ideal ratio.
    """

    mixer: str
    length: int
    forward: float
    both: float
    memory: float | None
    dense_forward: float
    dense_both: float
    visited: float | None

    @property
    def forward_ratio(self) -> float:
        return self.dense_forward / self.forward

    @property
    def both_ratio(self) -> float:
        return self.dense_both / self.both

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"forward_ratio": self.forward_ratio, "both_ratio": self.both_ratio}


@dataclass(frozen=True)
class Failure:
    """A mixer that could not be measured at a length, and why."""

    mixer: str
    length: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sparse_mixers() -> list[str]:
    """Sequence mixers that can hide the future and are tagged sparse or linear."""
    return sorted(
        e.name
        for e in index().values()
        if e.kind == "sequence" and e.causal != "never" and {"sparse", "linear"} & set(e.tags)
    )


def costs(names: list[str], lengths: list[int], device: str = "cpu") -> Iterator[Cost | Failure]:
    """Measure each mixer at each length in a process of its own; dense attention once a length."""
    for name in names:
        entry = find(name)
        if entry.kind != "sequence":
            raise ValueError(f"mixer {name!r} is of kind {entry.kind}, must be a sequence mixer")
    for length in lengths:
        dense = fresh(_measure, "self-attention", length, device)
        if isinstance(dense, str):
            raise RuntimeError(f"dense attention at {length} tokens: {dense}")
        for name in names:
            found = fresh(_measure, name, length, device)
            if isinstance(found, str):
                yield Failure(name, length, found)
                continue
            forward, both, memory, visited = found
            yield Cost(name, length, forward, both, memory, dense[0], dense[1], visited)


def build(name: str) -> Mixer:
    """The mixer at the width of this benchmark, causal, all else its defaults."""
    cls = find(name).load()
    known = inspect.signature(cls).parameters
    wanted = {"heads": HEADS, "causal": True}
    return cls(DIM, **{key: value for key, value in wanted.items() if key in known})


def _measure(name: str, length: int, device: str) -> tuple[float, float, float | None, float | None]:
    mixer = build(name).to(device)
    x = torch.randn(1, length, DIM, device=device, requires_grad=True)
    leaves = [x, *(p for p in mixer.parameters() if p.requires_grad)]

    def forward() -> object:
        with torch.no_grad():
            return mixer(x)

    def both() -> object:
        loss = mixer(x).sum() + sum(mixer.aux_losses.values())
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    memory = peak_memory(both, device)
    with observe() as visits:
        forward()
    dense = 2.0 * length * length * DIM
    visited = sum(v.products for v in visits) / dense if visits else None
    times = best_times([forward, both], 1 if length > 8192 else 3, device)
    return times[0], times[1], memory, None if visited is None or math.isnan(visited) else visited
