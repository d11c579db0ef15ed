"""`heedful bench restore`: super-resolution and restoration on two photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from heedful.cli import JsonFile, fail, wide_console


def register(bench: typer.Typer) -> None:
    bench.command("restore", help="Train restoration models on parts of two photographs, test on the rest.")(
        _restore
    )


def _restore(
    models: Annotated[
        str, typer.Option(help="Comma-separated names.")
    ] = "catanet,region-attention-transformer",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each model.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the start, the patches and the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write pictures here: before, after, original.")] = None,
    json_file: JsonFile = None,
) -> None:
    from heedful.bench import restore as bench

    names = models.split(",")
    console = wide_console()
    found: list[bench.Restored] = []
    try:
        if unknown := [name for name in names if name not in bench.TASKS]:
            fail(f"models has {unknown[0]!r}, must be of {', '.join(bench.TASKS)}")
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as bars:
            task = bars.add_task("", total=len(names) * steps, note="")
            for number, name in enumerate(names):

                def told(step: int, loss: float, name: str = name, done: int = number * steps) -> None:
                    note = f"step {step}/{steps}, loss {loss:.4f}"
                    bars.update(task, description=name, completed=done + step, note=note)

                found.append(bench.restore(name, steps=steps, seed=seed, on_step=told))
    except ValueError as wrong:
        fail(wrong)
    except KeyboardInterrupt:
        console.print("stopped; what is finished follows")
    table = Table(title="PSNR in decibels on the held-out third", box=None, header_style="bold")
    for column in ("model", "task", "parameters", "photograph", "before", "after", "gain", "training"):
        left = column in ("model", "task", "photograph")
        table.add_column(column, justify="left" if left else "right")
    for one in found:
        for score in one.scores:
            table.add_row(
                one.model,
                one.task,
                f"{one.parameters:,}",
                score.photograph,
                f"{one.before} {score.before:.2f}",
                f"{score.after:.2f}",
                f"{score.after - score.before:+.2f}",
                f"{one.seconds:.0f} s",
            )
    console.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for one in found:
            for score in one.scores:
                score.picture.save(out / f"{one.model}-{score.photograph}.png", optimize=True)
    if json_file is not None:
        json_file.write_text(json.dumps([one.as_dict() for one in found], indent=1))
