"""How much is trained and measured.

Steps are fixed before the start, by preset and budget alone, so that a seed gives the same quality in
every run. A budget scales the steps of the preset by the time they take on two ordinary cores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from heedful.bench.tasks import Task

# For the scaling alone: seconds of training with the baseline on two cores.
TOKEN_SECONDS = 1e-5
MEASURE_SECONDS = 1.0  # of one fresh process
LEARNING_RATE = {"recall": 8e-3, "text": 6e-3, "images": 4e-3}
FEWEST = 10  # steps, however small the budget


@dataclass(frozen=True)
class Preset:
    """Width and depth of the networks, training steps by task, seeds, and the sizes of the cost curves."""

    dim: int
    depth: int
    steps: dict[str, int]
    seeds: int
    lengths: tuple[int, ...]
    sides: tuple[int, ...]

    def seconds(self, task: Task) -> float:
        """About how long one mixer trains on the task, all seeds, on two cores."""
        return self.steps[task.name] * self.seeds * task.tokens * TOKEN_SECONDS

    def within(self, minutes: float, runs: list[Task], points: int) -> Preset:
        """The preset with its steps scaled so that it should take that long.

        runs: the task of each mixer that will be trained; points: how many fresh processes will measure.
        """
        training = sum(self.seconds(task) for task in runs)
        scale = max(0.0, 60 * minutes - points * MEASURE_SECONDS) / training if training else 1.0
        return replace(self, steps={t: max(FEWEST, round(n * scale)) for t, n in self.steps.items()})


PRESETS = {
    "quick": Preset(
        dim=64,
        depth=2,
        steps={"recall": 350, "text": 160, "images": 240},
        seeds=2,
        lengths=(256, 512, 1024, 2048, 4096),
        sides=(16, 32, 64),
    ),
    "full": Preset(
        dim=64,
        depth=2,
        steps={"recall": 1500, "text": 2000, "images": 1200},
        seeds=3,
        lengths=(256, 512, 1024, 2048, 4096, 8192, 16384),
        sides=(8, 16, 32, 64, 128),
    ),
}
