"""`heedful bench ops --mechanisms`: what whole mixers cost, beside dense attention of the same width."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
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
# These train a network inside the layer, token by token: minutes at 8192 tokens, and gigabytes.
INNER_TRAINING = ("neural-memory", "titans-mac", "titans-mag", "titans-mal", "titans-pytorch-memory")


@dataclass(frozen=True)
class Cost:
    """One mixer at one length, or on maps of one size. Times in seconds, memory in MiB.

    visited: share of the products of dense attention (itself causal, for a sequence) that the mixer's
    attention calls compute, or None where it makes none; its inverse is the ideal ratio.
    """

    mixer: str
    size: tuple[int, ...]
    forward: float
    both: float
    memory: float | None
    dense_forward: float
    dense_both: float
    visited: float | None

    @property
    def length(self) -> int:
        return math.prod(self.size)

    @property
    def forward_ratio(self) -> float:
        return self.dense_forward / self.forward

    @property
    def both_ratio(self) -> float:
        return self.dense_both / self.both

    @property
    def reached(self) -> float | None:
        """Share of the ideal ratio that the forward pass reaches."""
        return None if self.visited is None else self.forward_ratio * self.visited

    @property
    def reached_both(self) -> float | None:
        return None if self.visited is None else self.both_ratio * self.visited

    def as_dict(self) -> dict[str, Any]:
        names = ("length", "forward_ratio", "both_ratio", "reached", "reached_both")
        return asdict(self) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Failure:
    """A mixer that could not be measured at a size, and why."""

    mixer: str
    size: tuple[int, ...]
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


def default_mixers() -> list[str]:
    """The sparse mixers, with arguments, that are measured unless the user names others."""
    # As it is trained, with all blocks, landmark attention computes more than dense attention.
    given = {"landmark-attention": "landmark-attention:retrieve=4"}
    return [given.get(name, name) for name in sparse_mixers() if name not in INNER_TRAINING]


def sparse_grid_mixers(axes: int) -> list[str]:
    """Mixers of maps with this number of axes that are tagged sparse."""
    return sorted(
        e.name for e in index().values() if e.kind == "grid" and axes in e.spatial and "sparse" in e.tags
    )


def costs(
    mixers: str, sizes: Sequence[tuple[int, ...]], device: str = "cpu", *, kind: str = "sequence"
) -> Iterator[Cost | Failure]:
    """Measure each mixer at each size in a process of its own, in turns with dense attention.

    mixers: names, with arguments where wanted, as in "s2-attention,landmark-attention:retrieve=4".
    sizes: (tokens,) for sequence mixers; (height, width) or (frames, height, width) for kind="grid".
    """
    choices = parse(mixers)
    for choice in choices:
        if choice.entry.kind != kind:
            raise ValueError(
                f"mixer {choice.entry.name!r} is of kind {choice.entry.kind}, must be a {kind} mixer"
            )
    for size in sizes:
        for choice in choices:
            found = fresh(_measure, choice, size, device)
            yield Failure(choice.label, size, found) if isinstance(found, str) else found


def build(choice: Choice) -> Mixer:
    """The mixer at the width of this benchmark, all else its defaults or as given; sequences are causal."""
    cls = choice.entry.load()
    known = inspect.signature(cls).parameters
    wanted = {"heads": HEADS} | ({"causal": True} if choice.entry.kind == "sequence" else {})
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


def _measure(choice: Choice, size: tuple[int, ...], device: str) -> Cost:
    grid, length = choice.entry.kind == "grid", math.prod(size)
    x = torch.randn(1, length, DIM, device=device, requires_grad=True)
    maps = x.detach().mT.unflatten(-1, size).contiguous().requires_grad_() if grid else x
    forward, both = _steps(build(choice).to(device), maps)
    memory = peak_memory(both, device)
    dense = parse(f"{BASELINE}:causal=False" if grid else BASELINE)[0]
    dense_forward, dense_both = _steps(build(dense).to(device), x)
    products = _products(forward)
    visited = products / _products(dense_forward) if products else None
    # One step after the other, so that all see the same machine.
    steps = [forward, dense_forward, both, dense_both]
    times = best_times(steps, 1 if length > 8192 else 3, device)
    return Cost(choice.label, size, times[0], times[2], memory, times[1], times[3], visited)
