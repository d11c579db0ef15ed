"""`heedful list`: what there is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

import heedful
from heedful import catalogue
from heedful.cli import fail, wide_console
from heedful.registry import Entry


def register(app: typer.Typer) -> None:
    app.command(name="list", help="List the mechanisms, or those with a tag or of a kind.")(_list)


def _list(
    tag: Annotated[str | None, typer.Option(help="Only those with this tag, e.g. linear.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="Only those of this kind: sequence, grid, channel, pool, pattern ...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    try:
        found = catalogue.entries(tag=tag, kind=kind)
    except ValueError as wrong:
        fail(wrong)
    if as_json:
        typer.echo(json.dumps([row(e) for e in found], indent=1))
        return
    table = Table(box=None, header_style="bold")
    for column in ("name", "kind", "tags", "causal", "complexity", "paper"):
        table.add_column(column, no_wrap=column in ("name", "kind", "causal"), min_width=len(column))
    for e in found:
        cells = (e.name, e.kind, ", ".join(e.tags), e.causal, e.complexity, e.paper or "")
        table.add_row(*map(escape, cells))
    wide_console().print(table)


def row(entry: Entry) -> dict[str, Any]:
    """What `--json` tells of an entry."""
    return entry.as_dict() | {"path": file_of(entry), "also": catalogue.also(entry)}


def file_of(entry: Entry) -> str:
    """The path of an entry's file: relative where it lies below the working directory."""
    root = Path(heedful.__file__).parent.parent
    path = (root / entry.path) if entry.path else Path(_imported_file(entry))
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _imported_file(entry: Entry) -> str:
    """Of a class registered by another package, whose module is loaded already."""
    import inspect

    return inspect.getfile(entry.load())
