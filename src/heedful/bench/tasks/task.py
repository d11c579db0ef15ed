"""What a task is to the comparison: data, batches, and a measure of quality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

IGNORE = -100  # a target where nothing is asked, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Measure:
    """How good a trained network is: its name, which way is better, and what counts as the same."""

    name: str
    higher_is_better: bool
    tolerance: float  # differences below it are not worth speed

    def better(self, a: float, b: float) -> bool:
        """Whether quality a is better than quality b."""
        return a > b if self.higher_is_better else a < b

    def text(self, value: float) -> str:
        return f"{value:.3f}"


ACCURACY = Measure("accuracy", True, 0.01)
BITS_PER_BYTE = Measure("bits per byte", False, 0.02)


@runtime_checkable
class Task(Protocol):
    """Batches are (inputs, targets); targets have the shape of the logits without their last axis."""

    name: ClassVar[str]
    unit: ClassVar[str]  # what throughput counts: "tokens" or "images"
    measure: ClassVar[Measure]

    @property
    def classes(self) -> int:
        """Width of the logits."""
        ...

    @property
    def units(self) -> int:
        """How many units one training batch holds."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens the mixer sees in one training batch."""
        ...

    @property
    def goal(self) -> float:
        """The quality from which on the baseline counts as having learned the task."""
        ...

    @property
    def about(self) -> str:
        """The data and its reference figures, in a sentence."""
        ...

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A training batch, drawn with the generator."""
        ...

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out batches, the same in every call and never seen in training."""
        ...
