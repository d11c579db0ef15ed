"""`heedful bench`: what things cost."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from heedful.cli import (
    JsonFile,
    bench_decode_cost,
    bench_models,
    bench_recurrences,
    bench_restore,
    bench_theory,
    fail,
    whole_numbers,
    wide_console,
)


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure what things cost on this machine.", no_args_is_help=True)
    bench.command("ops", help="Time, memory and share of the ideal of each pattern, beside dense attention.")(
        _ops
    )
    bench_recurrences.register(bench)
    bench_models.register(bench)
    bench_theory.register(bench)
    bench_restore.register(bench)
    bench_decode_cost.register(bench)
    app.add_typer(bench, name="bench")


def _ops(
    patterns: Annotated[str | None, typer.Option(help="Comma-separated names; default: all.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated numbers of tokens; default 4096,16384, for mixers 2048,8192,32768."
        ),
    ] = None,
    mechanisms: Annotated[
        bool, typer.Option("--mechanisms", help="Measure whole mixers instead of patterns.")
    ] = False,
    mixers: Annotated[
        str | None,
        typer.Option(
            help="With --mechanisms: names, with arguments where wanted: superlinear,moa:beta=0.25; "
            "default: sparse and linear, but for those that train a network inside."
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="With --mechanisms: sizes of maps, 64x64 or 8x32x32, instead of lengths: measures mixers "
            "of maps beside dense attention over the same tokens."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    flex: Annotated[
        bool, typer.Option(help="Also compiled FlexAttention's forward (needs a C++ compiler).")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    from heedful.bench import ops

    lengths = lengths or ("2048,8192,32768" if mechanisms else "4096,16384")
    sizes = whole_numbers("lengths", lengths)
    if mechanisms:
        shapes = [(size,) for size in sizes] if grid is None else _shapes(grid)
        _mechanisms(mixers, shapes, "sequence" if grid is None else "grid", device, json_file)
        return
    names = patterns.split(",") if patterns else [*ops.PATTERNS]
    console = wide_console()
    found = []
    try:
        with console.status("measuring") as status:
            for point in ops.points(names, sizes, device, flex=flex):
                found.append(point)
                status.update(f"measured {point.pattern} at {point.length} tokens")
    except (ValueError, RuntimeError) as wrong:
        fail(wrong)
    except KeyboardInterrupt:
        console.print("stopped; what is finished follows")
    table = Table(
        title=f"B {ops.BATCH}, H {ops.HEADS}, D {ops.WIDTH}, float32, {device}; x = times faster than dense",
        box=None,
        header_style="bold",
    )
    for column in ("pattern", "tokens", "fwd ms", "fwd x", "fwd+bwd ms", "fwd+bwd x", "visible %", "ideal x"):
        table.add_column(column, justify="left" if column == "pattern" else "right")
    for column in ("of ideal %, fwd", "fwd+bwd", "MiB", *(["flex fwd ms"] if flex else [])):
        table.add_column(column, justify="right")
    for point in found:
        cells = [
            point.pattern,
            str(point.length),
            _number(point.forward, 1e3),
            _number(point.forward_ratio),
            _number(point.both, 1e3),
            _number(point.both_ratio),
            _number(point.visited, 100),
            _number(1 / point.ideal),
            _number(point.reached, 100, 0),
            _number(point.reached_both, 100, 0),
            _number(point.memory, 1, 0),
        ]
        table.add_row(*cells, *([_number(point.flex_forward, 1e3)] if flex else []))
    console.print(table)
    if json_file is not None:
        json_file.write_text(
            json.dumps([point.as_dict() for point in found], indent=1, allow_nan=False, default=str)
        )


def _shapes(grid: str) -> list[tuple[int, ...]]:
    try:
        shapes: list[tuple[int, ...]] = [tuple(int(side) for side in x.split("x")) for x in grid.split(",")]
    except ValueError:
        shapes = [()]
    if (
        len({len(shape) for shape in shapes}) > 1
        or len(shapes[0]) not in (1, 2, 3)
        or min(map(min, shapes)) < 1
    ):
        fail(f"grid is {grid!r}, must be sizes of maps with commas between, e.g. 8x32x32,16x32x32")
    return shapes


def _mechanisms(
    names: str | None, sizes: Sequence[tuple[int, ...]], kind: str, device: str, json_file: Path | None
) -> None:
    from heedful.bench import mechanisms as bench

    if names is None:
        listed = bench.default_mixers() if kind == "sequence" else bench.sparse_grid_mixers(len(sizes[0]))
        names = ",".join(listed)
    console = wide_console()
    found = []
    try:
        with console.status("measuring") as status:
            for cost in bench.costs(names, sizes, device, kind=kind):
                found.append(cost)
                status.update(f"measured {cost.mixer} at {_text(cost.size)} tokens")
    except (ValueError, RuntimeError) as wrong:
        fail(wrong)
    except KeyboardInterrupt:
        console.print("stopped; what is finished follows")
    table = Table(
        title=f"batch 1, dim {bench.DIM}, heads {bench.HEADS}, {device}; x = times faster than dense; "
        "% of it: share of the ideal",
        box=None,
        header_style="bold",
    )
    table.add_column("mixer", overflow="fold")
    for column in ("tokens", "fwd ms", "x", "+bwd ms", "x", "ideal x", "% of it", "+bwd %", "MiB"):
        table.add_column(column, justify="right")
    for cost in found:
        if isinstance(cost, bench.Failure):
            table.add_row(cost.mixer, _text(cost.size), "not measured")
            console.print(f"{cost.mixer} at {_text(cost.size)} tokens: {cost.reason}")
            continue
        table.add_row(
            cost.mixer,
            _text(cost.size),
            _number(cost.forward, 1e3),
            _number(cost.forward_ratio),
            _number(cost.both, 1e3),
            _number(cost.both_ratio),
            "-" if not cost.visited else _number(1 / cost.visited),
            _number(cost.reached, 100, 0),
            _number(cost.reached_both, 100, 0),
            _number(cost.memory, 1, 0),
        )
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([cost.as_dict() for cost in found], indent=1))


def _text(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def _number(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None or math.isnan(value) else f"{value * scale:.{digits}f}"
