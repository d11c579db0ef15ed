"""What a comparison finds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from heedful.bench.influence import Influence
from heedful.bench.measure import Point
from heedful.bench.tasks import Task


@dataclass
class Result:
    """The figures of one mixer on one task.

    quality is the mean over seeds and quality_spread their standard deviation (0 for one seed).
    throughput counts units (tokens or images) a second in training. peak_memory_mib is what a training
    step takes; None where the system does not tell. A multiply-add is two FLOPs.
    """

    mixer: str
    task: str
    label: str
    kind: str
    baseline: bool
    arguments: dict[str, Any]
    code: str
    quality: float
    quality_name: str
    higher_is_better: bool
    quality_spread: float
    quality_seeds: list[float]
    goal: float
    throughput: float
    throughput_unit: str
    peak_memory_mib: float | None
    parameters: int
    flops_per_unit: float
    flops_unit: str
    steps: int
    device: str
    threads: int
    cost_curve: list[Point] = field(default_factory=list)
    pareto: bool = False
    recommended: bool = False


@dataclass(frozen=True)
class Missing:
    """A mixer that has no figures on a task, and why."""

    label: str
    task: str
    reason: str


@dataclass
class Comparison:
    """Everything that was found, as far as the comparison came."""

    tasks: list[Task]
    preset: str
    machine: str
    results: list[Result] = field(default_factory=list)
    refused: list[Missing] = field(default_factory=list)
    failed: list[Missing] = field(default_factory=list)
    not_run: list[Missing] = field(default_factory=list)
    influences: dict[tuple[str, str], Influence] = field(default_factory=dict)  # by label and task
    advice: dict[str, str] = field(default_factory=dict)  # by task
    interrupted: bool = False

    def of(self, task: Task) -> list[Result]:
        return [r for r in self.results if r.task == task.name]

    def as_list(self) -> list[dict[str, Any]]:
        return [asdict(r) for r in self.results]

    def write_json(self, path: Path) -> None:
        """One object a mixer and task."""
        path.write_text(json.dumps(self.as_list(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
