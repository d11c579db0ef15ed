"""`heedful bench recurrences`: time a token of the linear recurrences, beside dense causal attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.bench.ops import best_times
from heedful.bench.process import fresh, peak_memory
from heedful.ops.delta import gated_delta_rule
from heedful.ops.linear import linear_attention
from heedful.ops.scan import selective_scan

Call = tuple[Callable[[], Any], list[Tensor]]  # an operator's call, and the tensors that take gradients
Make = Callable[[int, str], Call]

HEADS, WIDTH, STATE = 4, 64, 16  # STATE: numbers a channel of the selective scan
DENSE_UP_TO = 16384  # tokens; beyond, one dense pass takes minutes on two cores
FLAT_FROM = 4096  # tokens; below, what does not grow with length still shows


@dataclass(frozen=True)
class Pace:
    """One operator at one length, batch 1, float32. Times in seconds, memory in MiB."""

    op: str
    length: int
    forward: float
    both: float
    memory: float | None
    dense_forward: float | None = None
    dense_both: float | None = None

    @property
    def forward_ratio(self) -> float | None:
        return None if self.dense_forward is None else self.dense_forward / self.forward

    @property
    def both_ratio(self) -> float | None:
        return None if self.dense_both is None else self.dense_both / self.both

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"forward_ratio": self.forward_ratio, "both_ratio": self.both_ratio}


def paces(names: list[str], lengths: list[int], device: str = "cpu", repeats: int = 3) -> Iterator[Pace]:
    """Measure each operator at each length, every point in a process of its own."""
    for name in names:
        if name not in OPS:
            raise ValueError(f"op is {name!r}, must be one of {', '.join(OPS)}")
    for name in names:
        for length in lengths:
            result = fresh(_measure, name, length, device, repeats)
            if isinstance(result, str):
                raise RuntimeError(f"{name} at {length} tokens: {result}")
            yield result


def unevenness(found: list[Pace]) -> float | None:
    """How much the dearest length of one operator costs a token above the cheapest, forward and backward.

    0.2 is 20 %. Lengths below FLAT_FROM do not count; None if fewer than two are left.
    """
    per_token = [x.both / x.length for x in found if x.length >= FLAT_FROM]
    return max(per_token) / min(per_token) - 1 if len(per_token) > 1 else None


def _leaf(*size: int, device: str) -> Tensor:
    return torch.randn(size, device=device, requires_grad=True)


def _tokens(n: int, device: str) -> list[Tensor]:
    return [_leaf(1, HEADS, n, WIDTH, device=device) for _ in range(3)]


def _decay(*size: int, device: str) -> Tensor:
    return F.logsigmoid(torch.randn(size, device=device) + 3).requires_grad_()


def _linear(*decay: int | None) -> Make:
    """Linear attention with decays of this shape; None stands for the tokens."""

    def make(n: int, device: str) -> Call:
        q, k, v = _tokens(n, device)
        g = _decay(*(n if size is None else size for size in decay), device=device) if decay else None
        return lambda: linear_attention(q, k, v, log_decay=g), [q, k, v] + ([g] if g is not None else [])

    return make


def _delta(n: int, device: str) -> Call:
    q, k, v = _tokens(n, device)
    beta, g = _leaf(1, HEADS, n, device=device), _decay(1, HEADS, n, device=device)

    def step() -> Any:
        return gated_delta_rule(q, F.normalize(k, dim=-1), v, beta.sigmoid(), g)

    return step, [q, k, v, beta, g]


def _scan(n: int, device: str) -> Call:
    channels = HEADS * WIDTH
    u, delta = _leaf(1, channels, n, device=device), _leaf(1, channels, n, device=device)
    B, C = _leaf(1, STATE, n, device=device), _leaf(1, STATE, n, device=device)
    A = (-torch.arange(1.0, STATE + 1, device=device)).expand(channels, -1).clone().requires_grad_()
    return lambda: selective_scan(u, delta, A, B, C, delta_softplus=True), [u, delta, A, B, C]


OPS: dict[str, Make] = {
    "linear": _linear(),
    "linear-head-decay": _linear(HEADS),
    "linear-token-decay": _linear(1, HEADS, None),
    "linear-channel-decay": _linear(1, HEADS, None, WIDTH),
    "gated-delta-rule": _delta,
    "selective-scan": _scan,
}


def _measure(name: str, length: int, device: str, repeats: int) -> Pace:
    run, leaves = OPS[name](length, device)

    def forward() -> object:
        with torch.no_grad():
            return run()

    def both() -> object:
        return torch.autograd.grad(run().sum(), leaves)

    memory = peak_memory(both, device)
    if length > DENSE_UP_TO:
        alone = best_times([forward, both], repeats, device)
        return Pace(name, length, alone[0], alone[1], memory)
    q, k, v = _tokens(length, device)

    def dense() -> Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def dense_both() -> object:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(out.sum(), (q, k, v))

    times = best_times([forward, dense, both, dense_both], repeats, device)
    return Pace(name, length, times[0], times[2], memory, times[1], times[3])
