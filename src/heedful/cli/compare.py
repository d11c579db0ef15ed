"""`heedful compare`: which mixer to take, by evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from heedful.cli import JsonFile, fail, wide_console, writable


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compare")(compare)


def compare(
    task: Annotated[
        str,
        typer.Option(
            help="recall (with numbers: recall:length=512,pairs=8), text, images, or all of these; "
            "or cache: cache policies on a small pretrained model."
        ),
    ] = "all",
    mixers: Annotated[
        str | None,
        typer.Option(
            help="Names, with arguments where wanted: dense,faster-neighborhood-attention:window=7,eca; "
            "for the task cache names of policies: snapkv,streaming-llm"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A text file (text), or a folder with one folder of images a class (images)."),
    ] = None,
    preset: Annotated[str, typer.Option(help="quick (under 5 minutes on two cores) or full.")] = "quick",
    seeds: Annotated[
        int | None, typer.Option(help="Trainings of each mixer; the preset's number if not given.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps; the preset's number if not given.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="Blocks of the networks; the preset's number if not given.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            help="Scales the training steps to this time; what has not begun by then is not run.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; a GPU if there is one.")] = None,
    json: JsonFile = None,
    report: Annotated[
        Path | None, typer.Option(callback=writable, help="Write a self-contained HTML report to this file.")
    ] = None,
) -> None:
    """Train the same small network with each mixer on your task and machine; say which to take."""
    from heedful.bench import compare as bench
    from heedful.bench.progress import Live

    console = wide_console()
    if task == "cache":
        others = {"preset": preset != "quick", "seeds": seeds, "depth": depth, "budget": budget}
        _caches(
            console, mixers, data, steps, device, json, report, [name for name, on in others.items() if on]
        )
        return
    try:
        plan = bench.plan(
            task=task,
            mixers=mixers,
            data=data,
            preset=preset,
            seeds=seeds,
            steps=steps,
            depth=depth,
            budget=budget,
            device=device,
        )
    except ValueError as error:
        fail(error)
    found = bench.compare(plan, Live(console))
    _show(console, found)
    if json is not None:
        found.write_json(json)
        console.print(f"figures: {json}", markup=False, highlight=False)
    if report is not None:
        from heedful.bench.report import write_html

        write_html(found, report)
        console.print(f"report: {report}", markup=False, highlight=False)
    if found.interrupted:
        raise typer.Exit(130)


def _show(console: Console, found) -> None:  # type: ignore[no-untyped-def]
    from heedful.bench.report import code, missing, table

    for task in found.tasks:
        console.print()
        if found.of(task):
            console.print(table(found, task))
        for line in missing(found, task):
            console.print(line, style="dim", markup=False, highlight=False)
        console.print(found.advice[task.name], style="bold", markup=False, highlight=False)
        if line := code(found, task):
            console.print(f"    {line}", markup=False, highlight=False)


def _caches(
    console: Console,
    policies: str | None,
    data: Path | None,
    steps: int | None,
    device: str | None,
    json: Path | None,
    report: Path | None,
    unfit: list[str],
) -> None:
    from heedful.bench import cache as bench
    from heedful.bench.progress import Live

    try:
        if unfit:
            raise ValueError(
                f"the task cache has no {unfit[0]}; it takes mixers, data, steps, device, json, report"
            )
        plan = bench.plan(policies=policies, data=data, steps=steps, device=device)
    except ValueError as error:
        fail(error)
    from heedful.bench import cache_report

    found = bench.compare(plan, Live(console))
    if found.results:
        console.print(cache_report.table(found))
        console.print(cache_report.advice(found), style="bold", markup=False, highlight=False)
    if json is not None:
        found.write_json(json)
        console.print(f"figures: {json}", markup=False, highlight=False)
    if report is not None and found.results:
        cache_report.write_html(found, report)
        console.print(f"report: {report}", markup=False, highlight=False)
    if found.interrupted:
        raise typer.Exit(130)
