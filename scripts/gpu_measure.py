"""Times and differences of two ways to compute the same, on a CUDA GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
from torch import Tensor


def difference(
    one: Callable[[], Tensor], other: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor
) -> float:
    """The largest ||a - b|| / ||b|| of outputs and gradients."""
    pairs = []
    for step in (one, other):
        out = step()
        pairs.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    ratios = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*pairs, strict=True)]
    return max(math.inf if math.isnan(x) else x for x in ratios)


def times(step: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> list[float]:
    """Milliseconds of the forward pass, and of forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            step()

    return [time_of(forward), time_of(lambda: torch.autograd.grad(step(), leaves, grad))]


def time_of(step: Callable[[], object]) -> float:
    step()
    # The median; the cache is cleared between repeats.
    return float(triton.testing.do_bench(step, warmup=50, rep=200, return_mode="median"))


def pair(values: list[float] | None, digits: int) -> str:
    return "-" if values is None else " ".join(f"{y:.{digits}f}" for y in values)
