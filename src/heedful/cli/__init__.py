"""The `heedful` command. A sub-command's file is loaded when the sub-command is named."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

# Where each sub-command lives; its module has `register(app)`.
_MODULES = {
    "compare": "heedful.cli.compare",
    "list": "heedful.cli.list",
    "show": "heedful.cli.show",
    "bench": "heedful.cli.bench",
    "models": "heedful.cli.models",
    "export": "heedful.cli.models",
    "convert": "heedful.cli.convert",
    "inspect": "heedful.cli.inspect",
}


class _LazyGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> Any:
        return [*_MODULES]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _MODULES:
            return None
        if cmd_name not in self.commands:
            part = typer.Typer()
            importlib.import_module(_MODULES[cmd_name]).register(part)
            self.commands[cmd_name] = typer.main.get_group(part).commands[cmd_name]
        return self.commands[cmd_name]


app = typer.Typer(
    cls=_LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Attention mechanisms under one interface: see what there is, compare, measure.",
)


def _version(wanted: bool) -> bool:
    if wanted:
        from heedful import __version__

        typer.echo(f"heedful {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def fail(message: object) -> NoReturn:
    """Leave with one line on standard error and exit code 2."""
    typer.echo(f"heedful: {message}", err=True)
    raise typer.Exit(2)


def wide_console() -> Console:
    """What tables go to; a file has room for whole names."""
    return Console(width=None if sys.stdout.isatty() else 120)


def whole_numbers(name: str, text: str) -> list[int]:
    """The numbers of an option such as 4096,16384."""
    try:
        numbers = [int(x) for x in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        fail(f"{name} is {text!r}, must be whole numbers of at least 1 with commas between, e.g. 2,16")
    return numbers


def writable(file: Path | None) -> Path | None:
    """Refuse a file that could not be written, before anything long has run."""
    if file is not None and not file.absolute().parent.is_dir():
        fail(f"{file.absolute().parent} is not a folder; {file.name} cannot be written there")
    return file


JsonFile = Annotated[Path | None, typer.Option("--json", callback=writable, help="Write the figures here.")]


def main() -> None:
    """Entry point of the `heedful` command."""
    try:
        app()
    except BrokenPipeError:  # `heedful list | head`
        sys.stderr.close()
        raise SystemExit(141) from None
