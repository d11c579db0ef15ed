"""`heedful models` and `heedful export`: published configurations, and what becomes of them on a device."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from heedful.cli import fail, wide_console


def register(app: typer.Typer) -> None:
    app.command(name="models", help="List the published models: parameters, multiply-adds, image size.")(
        _models
    )
    app.command(
        name="export", help="Write a model as an ONNX file and check it with onnxruntime (extra: export)."
    )(_export)


def _models(
    family: Annotated[
        str | None, typer.Option(help="Only those of this family, e.g. biformer-backbone.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    from heedful.models import named

    found = named.list(family=family)
    if not found:
        families = sorted({n.family for n in named.list()})
        fail(f"family is {family!r}, must be one of {', '.join(families)}")
    if as_json:
        typer.echo(
            json.dumps([asdict(n) | {"paper": n.entry.paper, "path": n.entry.path} for n in found], indent=1)
        )
        return
    table = Table(box=None, header_style="bold")
    for column in ("name", "parameters", "multiply-adds", "image", "family", "paper"):
        right = column in ("parameters", "multiply-adds", "image")
        table.add_column(column, justify="right" if right else "left", no_wrap=column == "name")
    for n in found:
        count = "" if n.parameters is None else f"{n.parameters:,}"
        table.add_row(n.name, count, n.flops or "", str(n.size), n.family, n.entry.paper or "")
    wide_console().print(table)


def _export(
    name: Annotated[
        str, typer.Argument(help="A published model, e.g. shvit_s1; `heedful models` lists them.")
    ],
    file: Annotated[Path, typer.Argument(help="The ONNX file to write.")],
    classes: Annotated[int, typer.Option(help="Outputs of the head.")] = 1000,
    size: Annotated[
        int | None, typer.Option(help="Side of the image, in pixels; default: the published one.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A safetensors file with heedful's or the authors' parameter names.")
    ] = None,
) -> None:
    from heedful.models import named
    from heedful.models.backbone import Backbone
    from heedful.models.export import export_onnx

    try:
        told = named.find(name)
        model: Any = named.create(name, classes=classes)
        if not isinstance(model, Backbone):
            raise ValueError(f"{name!r} is a {type(model).__name__}, must be an image backbone")
        if weights is not None:
            _load(model, weights)
        side = size or told.size
        error = export_onnx(model, file, size=(side, side))
    except (ValueError, ImportError, OSError) as wrong:
        fail(wrong)
    typer.echo(
        f"{file}: {file.stat().st_size / 2**20:.1f} MiB, images (n, {model.in_channels}, {side}, {side}); "
        f"onnxruntime agrees with torch to {error:.1e}"
    )


def _load(model: Any, file: Path) -> None:
    from safetensors.torch import load_file

    from heedful import authors

    state = load_file(file)
    if state.keys() == model.state_dict().keys():
        model.load_state_dict(state)
    else:
        authors.load(model, state)
