"""What the user sees while a comparison runs."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@runtime_checkable
class Watch(Protocol):
    """Is told what happens; seconds are estimates and serve as weights."""

    def begin(self, seconds: float) -> None: ...
    def start(self, title: str, steps: int) -> None: ...
    def step(self, step: int, loss: float) -> None: ...
    def finish(self, seconds: float, line: str = "") -> None: ...
    def end(self) -> None: ...


class Silent:
    """Shows nothing."""

    def begin(self, seconds: float) -> None: ...
    def start(self, title: str, steps: int) -> None: ...
    def step(self, step: int, loss: float) -> None: ...
    def finish(self, seconds: float, line: str = "") -> None: ...
    def end(self) -> None: ...


class Live:
    """Two bars: the whole comparison with the time left, and the current training with its loss."""

    def __init__(self, console: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.whole = self.bars.add_task("comparison", note="", total=None)
        self.current = self.bars.add_task("", note="", total=None)

    def begin(self, seconds: float) -> None:
        self.bars.update(self.whole, total=seconds)
        self.bars.start()

    def start(self, title: str, steps: int) -> None:
        self.bars.reset(self.current, description=title, total=steps or None, note="")

    def step(self, step: int, loss: float) -> None:
        total = self.bars.tasks[self.current].total
        self.bars.update(self.current, completed=step, note=f"step {step}/{total:.0f}  loss {loss:.3f}")

    def finish(self, seconds: float, line: str = "") -> None:
        self.bars.advance(self.whole, seconds)
        if line:
            self.bars.console.print(line, highlight=False, markup=False)

    def end(self) -> None:
        self.bars.stop()
