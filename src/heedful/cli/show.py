"""`heedful show NAME`: everything about one mechanism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from heedful import catalogue
from heedful.cli import fail
from heedful.cli.list import file_of


def register(app: typer.Typer) -> None:
    app.command(
        name="show",
        help="Show one mechanism: what it is, its paper and file, how to call it, what it can do and what "
        "proves it.",
    )(_show)


def _show(
    name: Annotated[str, typer.Argument(help="A registered name, an alias, or the key of a paper.")],
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a picture (png, svg, pdf): a pattern's mask, or what influences what in a mixer.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    try:
        entry = catalogue.find(name)
    except ValueError as wrong:
        fail(wrong)
    from heedful.catalogue.page import page  # loads torch

    if plot is not None:
        from heedful.catalogue.picture import draw

        try:
            draw(entry, plot)
        except (ValueError, OSError) as wrong:
            fail(wrong)
    told = page(entry, name if name in catalogue.papers() else None) | {"path": file_of(entry)}
    if as_json:
        typer.echo(json.dumps(told, indent=1))
        return
    _print(told)
    if plot is not None:
        typer.echo(f"\npicture: {plot}")


def _print(told: dict[str, Any]) -> None:
    console = Console(highlight=False)

    def part(title: str, text: str) -> None:
        if text:
            console.print(f"\n[bold]{title}[/]")
            console.print(escape(text), soft_wrap=True)

    console.print(f"[bold]{escape(told['name'])}[/]  ({told['kind']})")
    if told["what"]:
        console.print(escape(told["what"]), soft_wrap=True)
    if told["also"]:
        console.print(escape(f"see also: {', '.join(told['also'])}"), soft_wrap=True)
    part("What it is", told["doc"])
    part("File", told["path"])
    part("How to call it", told["signature"])
    console.print(escape(told["call"]), soft_wrap=True)
    part("Complexity", told["complexity"])
    part("What it can do", _abilities(told))
    part("What it does not do", "\n".join(f"- {t}" for t in told["limits"]))
    exempt = [f"not checked: {check} ({why})" for check, why in told["exempt"].items()]
    part("What proves it", "\n".join(f"- {t}" for t in [*told["proof"], *exempt]))
    source = told["source"]
    if source:
        year = "" if str(source["year"]) in source["venue"] else str(source["year"])
        arxiv = source["arxiv"] and f"arXiv {source['arxiv']}"
        where = ", ".join(filter(None, (source["venue"], year, arxiv)))
        part("Paper", f"{source['title']} ({where})\n{source['bibtex']}")
    part("Licence of the authors' weights", told["weights_licence"])


def _abilities(told: dict[str, Any]) -> str:
    causal = {
        "never": "- not causal: every output may depend on every input",
        "optional": "- causal where asked for (causal=True), else not",
        "always": "- always causal",
    }
    lines = [causal[told["causal"]]] if told["kind"] == "sequence" or told["causal"] != "never" else []
    if told["cross"]:
        lines.append("- attends to another sequence (context)")
    if told["decode"]:
        lines.append("- continues a sequence from a state (init_state), in pieces or token by token")
    if told["spatial"]:
        lines.append(f"- takes {' or '.join(map(str, told['spatial']))} spatial axes, of any size")
    if told["extra_inputs"]:
        lines.append(f"- takes further inputs: {', '.join(told['extra_inputs'])}")
    if told["tags"]:
        lines.append(f"- tags: {', '.join(told['tags'])}")
    return "\n".join(lines)
