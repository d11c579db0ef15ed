"""Training for a fixed number of steps, and the quality on held-out data.

The number of steps is given, never the time: the same seed gives the same figures on the same machine.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from heedful.bench.tasks import IGNORE, Task

OnStep = Callable[[int, float], None]  # step, loss


@dataclass(frozen=True)
class Trained:
    """Quality on held-out data, and speed: units (tokens or images) a second over the median step."""

    quality: float
    throughput: float
    loss: float


def train(
    model: nn.Module,
    task: Task,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    on_step: OnStep = lambda step, loss: None,
) -> Trained:
    """AdamW with a warm-up of a tenth of the steps and a cosine decay to zero; gradients cut at norm 1.

    Raises FloatingPointError if the loss stops being finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    seconds = []
    value = math.nan
    model.train()
    for step in range(steps):
        inputs, targets = (x.to(device) for x in task.batch(generator))
        start = time.perf_counter()
        loss = training_loss(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        value = loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} after {step + 1} steps")
        on_step(step + 1, value)
    return Trained(evaluate(model, task, device), task.units / statistics.median(seconds), value)


def training_loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy where something is asked, plus the auxiliary losses of the mixers."""
    logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE)
    for module in model.modules():
        for auxiliary in getattr(module, "aux_losses", {}).values():
            loss = loss + auxiliary
    return loss


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, device: torch.device) -> float:
    """Accuracy, or bits for each symbol, over the held-out data."""
    model.eval()
    total, asked = 0.0, 0
    for inputs, targets in task.held_out():
        logits = model(inputs.to(device)).flatten(0, -2)
        wanted = targets.to(device).flatten()
        logits, wanted = logits[wanted != IGNORE], wanted[wanted != IGNORE]
        if task.measure.name == "accuracy":
            total += float((logits.argmax(-1) == wanted).sum())
        else:
            total += float(F.cross_entropy(logits, wanted, reduction="sum")) / math.log(2)
        asked += len(wanted)
    return total / asked


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
