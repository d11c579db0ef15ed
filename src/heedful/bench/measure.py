"""What a mixer costs: parameters, FLOPs, and in a process of its own, time and peak memory."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from heedful.bench.choices import Choice
from heedful.bench.process import fresh, peak_memory
from heedful.bench.tasks import Task
from heedful.bench.train import training_loss
from heedful.models.count import multiply_adds

ENOUGH = 0.2  # seconds of repeated measurement of one point


@dataclass(frozen=True)
class Point:
    """One point of a cost curve: forward and backward of the mixer alone, one sequence or image."""

    tokens: int
    side: int | None  # of the image; None for a sequence
    milliseconds: float
    memory_mib: float | None  # None where the system does not tell


def flops(model: nn.Module, inputs: torch.Tensor) -> int:
    """Floating-point operations of a forward, a multiply-add counted as two."""
    return 2 * multiply_adds(model, inputs)


def cost(choice: Choice, *, dim: int, tokens: int, side: int | None, device: str) -> Point | str:
    """A point of the mixer's cost curve, measured in a fresh process; a string says why there is none."""
    found = fresh(_cost, choice, dim, tokens, side, device)
    return found if isinstance(found, str) else Point(tokens, side, *found)


def step_memory(choice: Choice, task: Task, *, dim: int, depth: int, device: str) -> float | str | None:
    """MiB that a training step of the task's network takes at its peak, measured in a fresh process."""
    return fresh(_step_memory, choice, task, dim, depth, device)


# -- in the fresh process -------------------------------------------------------------------------


def _cost(choice: Choice, dim: int, tokens: int, side: int | None, device: str) -> tuple[float, float | None]:
    mixer = choice.mixer(dim=dim, causal=side is None, side=side).to(device)
    small = 64 if side is None else 8 * 8

    def step(n: int) -> None:
        x = torch.randn(1, n, dim, device=device, requires_grad=True)
        mixer(x).sum().backward()

    step(min(small, tokens))  # loads what is loaded once
    memory = peak_memory(lambda: step(tokens), device)
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < ENOUGH and len(seconds) < 50):
        start = time.perf_counter()
        step(tokens)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > 10 * ENOUGH:
            break
    return 1000 * statistics.median(seconds), memory


def _step_memory(choice: Choice, task: Task, dim: int, depth: int, device: str) -> float | None:
    model = choice.host(task, dim=dim, depth=depth).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = [x.to(device) for x in task.batch(torch.Generator().manual_seed(0))]

    def step(rows: int) -> None:
        training_loss(model, *(x[:rows] for x in batch)).backward()
        optimizer.step()

    step(1)
    return peak_memory(lambda: step(len(batch[0])), device)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
