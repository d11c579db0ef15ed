"""`heedful bench recurrences`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from heedful.cli import JsonFile, fail, whole_numbers, wide_console


def register(bench: typer.Typer) -> None:
    bench.command("recurrences", help="Time a token of the linear recurrences, beside dense attention.")(_run)


def _run(
    ops: Annotated[str | None, typer.Option(help="Comma-separated names; default: all.")] = None,
    lengths: Annotated[
        str, typer.Option(help="Comma-separated numbers of tokens.")
    ] = "2048,4096,8192,16384,32768,65536",
    repeats: Annotated[int, typer.Option(min=1, help="The shortest of so many times counts.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    from heedful.bench import recurrences as bench

    sizes = whole_numbers("lengths", lengths)
    names = ops.split(",") if ops else [*bench.OPS]
    console = wide_console()
    found = []
    try:
        with console.status("measuring") as status:
            for pace in bench.paces(names, sizes, device, repeats):
                found.append(pace)
                status.update(f"measured {pace.op} at {pace.length} tokens")
    except (ValueError, RuntimeError) as wrong:
        fail(wrong)
    except KeyboardInterrupt:
        console.print("stopped; what is finished follows")
    table = Table(
        title=f"B 1, H {bench.HEADS}, D {bench.WIDTH}, float32, {device}; x = times faster than dense causal",
        box=None,
        header_style="bold",
    )
    for column in ("op", "tokens", "fwd us a token", "fwd x", "fwd+bwd us a token", "fwd+bwd x", "MiB"):
        table.add_column(column, justify="left" if column == "op" else "right")
    for pace in found:
        table.add_row(
            pace.op,
            str(pace.length),
            f"{pace.forward / pace.length * 1e6:.1f}",
            "-" if pace.forward_ratio is None else f"{pace.forward_ratio:.1f}",
            f"{pace.both / pace.length * 1e6:.1f}",
            "-" if pace.both_ratio is None else f"{pace.both_ratio:.1f}",
            "-" if pace.memory is None else f"{pace.memory:.0f}",
        )
    console.print(table)
    for name in names:
        uneven = bench.unevenness([pace for pace in found if pace.op == name])
        if uneven is not None:
            console.print(f"{name}: from {bench.FLAT_FROM} tokens on, within {uneven:.0%} a token (fwd+bwd)")
    if json_file is not None:
        json_file.write_text(json.dumps([pace.as_dict() for pace in found], indent=1, allow_nan=False))
