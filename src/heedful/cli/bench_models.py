"""`heedful bench digits` and `heedful bench models`: what image backbones learn, and how fast they are."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from heedful.cli import JsonFile, fail, wide_console

Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]


def register(bench: typer.Typer) -> None:
    bench.command("digits", help="Train a tiny instance of each backbone family on scikit-learn's digits.")(
        _digits
    )
    bench.command("models", help="Images a second of published models, beside timm's (extra: vision).")(
        _models
    )


def _digits(
    families: Annotated[
        str | None, typer.Option(help="Comma-separated, e.g. biformer,maxvit; default: all.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the training images; default 20, plain transformers 60."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the start and of the batches.")] = 0,
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    import torch

    from heedful.bench import digits

    torch.set_num_threads(threads)
    console = wide_console()
    found: list[digits.Learned] = []
    try:
        names = digits.families(families)
        images = digits.task()
        totals = [digits.steps(images, epochs or digits.usual_epochs(name)) for name in names]
        with _progress(console) as bars:
            task = bars.add_task("training", total=sum(totals), note="")

            def told(step: int, loss: float) -> None:
                done = len(found)
                note = f"{names[done]}, step {step}/{totals[done]}, loss {loss:.3f}"
                bars.update(task, completed=sum(totals[:done]) + step, note=note)

            for learned in digits.results(names, epochs=epochs, seed=seed, on_step=told):
                found.append(learned)
    except (ValueError, FloatingPointError) as wrong:
        fail(wrong)
    except KeyboardInterrupt:
        console.print("stopped; what is finished follows")
    title = "digits of 32 x 32, accuracy on a held-out third"
    table = _table(title, "parameters", "epochs", "accuracy", "CPU s")
    for one in found:
        mark = "" if one.accuracy >= digits.GOAL else " *"
        accuracy = f"{100 * one.accuracy:.1f} %{mark}"
        table.add_row(one.family, f"{one.parameters:,}", str(one.epochs), accuracy, f"{one.seconds:.0f}")
    console.print(table)
    if any(one.accuracy < digits.GOAL for one in found):
        console.print(f"* below {100 * digits.GOAL:.0f} %")
    if json_file is not None:
        json_file.write_text(json.dumps([one.as_dict() for one in found], indent=1))


def _models(
    models: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names, e.g. davit_tiny,van_b0; default: one small model a family."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each step.")] = 5,
    threads: Threads = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    import torch

    from heedful.bench import models as bench

    torch.set_num_threads(threads)
    console = wide_console()
    found: list[bench.Speed] = []
    try:
        names = bench.choose(models)
        with console.status("measuring") as status:

            def told(ours: str, theirs: str) -> None:
                status.update(f"{len(found) + 1} of {len(names)}: {ours} beside {theirs}")

            for speed in bench.speeds(names, batch=batch, device=device, rounds=rounds, on_pair=told):
                found.append(speed)
    except (ValueError, ImportError, RuntimeError) as wrong:
        fail(wrong)
    except KeyboardInterrupt:
        console.print("stopped; what is finished follows")
    title = f"images a second, batch {batch}, {threads} threads, {device}; x = times timm's; = the same model"
    table = _table(title, "timm", "M adds", "forward", "timm", "x", "training", "timm", "x")
    for one in found:
        table.add_row(
            one.model,
            ("= " if one.same else f"{one.timm_multiply_adds / 1e6:,.0f} ") + one.timm,
            f"{one.multiply_adds / 1e6:,.0f}",
            f"{one.forward:.1f}",
            f"{one.timm_forward:.1f}",
            f"{one.forward_ratio:.2f}",
            f"{one.training:.1f}",
            f"{one.timm_training:.1f}",
            f"{one.training_ratio:.2f}",
        )
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([one.as_dict() for one in found], indent=1))


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, header_style="bold")
    table.add_column("model", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
