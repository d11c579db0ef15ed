"""`heedful bench icl` and `heedful bench rf`: experiments of theory papers, small enough to run at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from heedful.cli import JsonFile, fail, whole_numbers, wide_console

Seed = Annotated[int, typer.Option(help="Of the data and of the start.")]


def register(bench: typer.Typer) -> None:
    bench.command("icl", help="What softmax attention learns of linear regression from its prompt.")(_icl)
    bench.command("rf", help="What attention with random queries and keys can learn.")(_rf)


def _icl(
    heads: Annotated[str, typer.Option(help="Comma-separated numbers of heads.")] = "1,2,4",
    layers: Annotated[
        str, typer.Option(help="Comma-separated numbers of layers; several are causal, with residuals.")
    ] = "1",
    steps: Annotated[int, typer.Option(help="Training steps of each network.")] = 2000,
    starts: Annotated[int, typer.Option(help="Seeds of each network, of which the best is shown.")] = 2,
    start: Annotated[
        str,
        typer.Option(
            help="Where one layer begins: random, small-identity, small-identity-qk, opposite-small-identity."
        ),
    ] = "random",
    correlation: Annotated[
        float, typer.Option(help="Of neighbouring numbers in x, below 1; of others, its powers.")
    ] = 0.0,
    lengths: Annotated[
        str | None, typer.Option(help="Comma-separated numbers of pairs to test with; training has 40.")
    ] = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    from heedful.bench import icl

    counts, depths = whole_numbers("heads", heads), whole_numbers("layers", layers)
    others = [] if lengths is None else whole_numbers("lengths", lengths)
    console = wide_console()
    try:
        with _progress(console) as bars:
            networks = len(counts) * len(depths)
            task = bars.add_task("training", total=max(1, networks * starts * steps), note="")

            def told(network: tuple[int, int], run: int, step: int, loss: float) -> None:
                note = f"layers {network[0]}, heads {network[1]}, seed {run + 1}/{starts}, loss {loss:.3f}"
                bars.update(task, advance=1, note=note)

            report = icl.experiment(
                heads=counts,
                layers=depths,
                steps=steps,
                starts=starts,
                start=start,
                lengths=others,
                seed=seed,
                task=icl.LinearRegression(correlation=correlation),
                on_step=told,
            )
    except ValueError as wrong:
        fail(wrong)
    of_lengths = [f"{length} pairs" for length in others]
    table = _table("square error on unseen prompts", "network", "error", *of_lengths, "omega", "mu")
    for layer in report.learned:
        name = "attention" if layer.layers == 1 else f"{layer.layers} layers of attention"
        errors = (layer.loss, *layer.by_length.values())
        shown = (" ".join(f"{x:+.2f}" for x in numbers) for numbers in (layer.omega, layer.mu))
        table.add_row(f"{name}, heads: {layer.heads}", *(f"{x:.3f}" for x in errors), *shown)
    for name, error in report.estimators.items():
        errors = (error, *(report.by_length[length][name] for length in others))
        table.add_row(name, *(f"{x:.3f}" for x in errors), "", "")
    _show(console, table, report, json_file)


def _rf(
    heads: Annotated[int | None, typer.Option(help="Heads of the random layers; default 150.")] = None,
    keys: Annotated[str | None, typer.Option(help="Comma-separated numbers of keys; default 2,16.")] = None,
    samples: Annotated[
        str | None, typer.Option(help="Comma-separated numbers of training samples; default 500,1500.")
    ] = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    from heedful.bench import random_features as rf

    heads = rf.HEADS if heads is None else heads
    sizes = rf.KEYS if keys is None else whole_numbers("keys", keys)
    counts = rf.SAMPLES if samples is None else whole_numbers("samples", samples)
    console = wide_console()
    try:
        with _progress(console) as bars:
            task = bars.add_task("fitting", total=len(sizes) * len(counts) * len(rf.TARGETS), note="")

            def told(point: rf.Point) -> None:
                bars.update(task, advance=1, note=f"{point.keys} keys, {point.samples} samples")

            report = rf.experiment(heads=heads, keys=sizes, samples=counts, seed=seed, on_point=told)
    except ValueError as wrong:
        fail(wrong)
    title = "square error on unseen data, 1 = that of the mean"
    table = _table(title, "mean over keys of", "keys", "samples", "attention", "biased", "two-layer net")
    for point in report.points:
        errors = (f"{x:.3f}" for x in (point.attention, point.biased, point.mlp))
        table.add_row(point.target, str(point.keys), str(point.samples), *errors)
    _show(console, table, report, json_file)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _show(console: Console, table: Table, report: Any, json_file: Path | None) -> None:
    console.print(table)
    console.print()
    found = _table("patterns", "pattern", "measured", "bound", "holds")
    for finding in report.findings:
        measured = f"{finding.measured:.3g}"
        found.add_row(finding.pattern, measured, finding.bound, "yes" if finding.holds else "NO")
    console.print(found)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=1))
