"""`heedful bench ops --mechanisms`: what whole mixers cost, beside dense attention of the same width."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from heedful.bench.choices import BASELINE, Choice, parse
from heedful.bench.ops import best_times
from heedful.bench.process import fresh, peak_memory
from heedful.mixers.mixer import Mixer
from heedful.mixers.sparse.flux_attention import FluxAttention
from heedful.ops.observe import observe
from heedful.registry import index

DIM, HEADS = 256, 4


@dataclass(frozen=True)
class Cost:
    """One mixer at one length. Times in seconds, memory in MiB.

    visited: share of the products of dense attention, itself causal, that the mixer's attention calls
    compute, or None where it makes none; its inverse is the ideal ratio.
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


def costs(mixers: str, lengths: list[int], device: str = "cpu") -> Iterator[Cost | Failure]:
    """Measure each mixer at each length in a process of its own, in turns with dense attention.

    mixers: names, with arguments where wanted, as in "s2-attention,landmark-attention:retrieve=4".
    """
    choices = parse(mixers)
    for choice in choices:
        if choice.entry.kind != "sequence":
            raise ValueError(
                f"mixer {choice.entry.name!r} is of kind {choice.entry.kind}, must be a sequence mixer"
            )
    for length in lengths:
        for choice in choices:
            found = fresh(_measure, choice, length, device)
            yield Failure(choice.label, length, found) if isinstance(found, str) else found


def build(choice: Choice) -> Mixer:
    """The mixer at the width of this benchmark, causal, all else its defaults or as given."""
    cls = choice.entry.load()
    known = inspect.signature(cls).parameters
    wanted = {"heads": HEADS, "causal": True}
    mixer = cls(DIM, **{key: value for key, value in wanted.items() if key in known} | dict(choice.given))
    if isinstance(mixer, FluxAttention):
        # It starts dense, and trains both of its branches: what it saves shows where it has decided.
        with torch.no_grad():
            mixer.router.head[-1].bias.copy_(torch.tensor([4.5, 0.0]))  # type: ignore[union-attr, operator]
        mixer.eval()
    return mixer


def _steps(mixer: Mixer, x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """A forward pass without gradients; a forward and a backward pass."""
    leaves = [x, *(p for p in mixer.parameters() if p.requires_grad)]

    def forward() -> object:
        with torch.no_grad():
            return mixer(x)

    def both() -> object:
        loss = mixer(x).sum() + sum(mixer.aux_losses.values())
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    return forward, both


def _products(forward: Callable[[], object]) -> float:
    with observe() as visits:
        forward()
    return sum(visit.products for visit in visits)


def _measure(choice: Choice, length: int, device: str) -> Cost:
    x = torch.randn(1, length, DIM, device=device, requires_grad=True)
    forward, both = _steps(build(choice).to(device), x)
    memory = peak_memory(both, device)
    dense_forward, dense_both = _steps(build(parse(BASELINE)[0]).to(device), x)
    products = _products(forward)
    visited = products / _products(dense_forward) if products else None
    # One step after the other, so that all see the same machine.
    steps = [forward, dense_forward, both, dense_both]
    times = best_times(steps, 1 if length > 8192 else 3, device)
    return Cost(choice.label, length, times[0], times[2], memory, times[1], times[3], visited)
