"""`heedful bench decode-cost`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from heedful.cli import JsonFile, fail, whole_numbers, wide_console


def register(bench: typer.Typer) -> None:
    bench.command("decode-cost", help="Work out what a decoded token of known models costs.")(_run)


def _run(
    models: Annotated[str | None, typer.Option(help="Comma-separated names; default: all.")] = None,
    contexts: Annotated[str, typer.Option(help="Comma-separated numbers of tokens seen.")] = "8192,32768",
    share: Annotated[
        float, typer.Option(help="Share of the experts that a token goes through, for the batches.")
    ] = 0.08,
    json_file: JsonFile = None,
) -> None:
    from heedful.bench import decode_cost as bench
    from heedful.bench import disaggregation

    sizes = whole_numbers("contexts", contexts)
    step3 = next(model for model in bench.MODELS if isinstance(model, bench.Model))
    names = models.split(",") if models else [model.name for model in bench.MODELS]
    devices: list[dict[str, Any]] = []
    try:
        found = bench.costs(names, sizes)
        for device in bench.DEVICES:
            batch = disaggregation.moe_batch(device, share)
            network = disaggregation.NETWORKS[device.name]
            devices.append(
                {
                    "device": device.name,
                    "per_flop": device.per_flop,
                    "per_byte": device.per_byte,
                    "dense_batch": disaggregation.dense_batch(device),
                    "moe_batch": batch,
                    "transfer_bytes": disaggregation.transfer_bytes(step3.dim, batch),
                    "least_share": disaggregation.least_share(
                        device, dim=step3.dim, layers=step3.layers, network=network
                    ),
                }
            )
    except ValueError as wrong:
        fail(wrong)
    console = wide_console()
    table = _table("a decoded token; $ for 1M of them, on the cheapest pair of devices", "model")
    for column in ("context", "KV bytes", "attention", "linear", "FFN FLOPs", "FLOPs/byte", "$"):
        table.add_column(column, justify="right")
    table.add_column("attention on")
    table.add_column("FFN on")
    for cost in found:
        load = cost.load
        table.add_row(
            cost.model,
            str(cost.context),
            *(f"{x:.2e}" for x in (load.kv_bytes, load.attention, load.linear, load.ffn)),
            f"{load.intensity:.0f}",
            f"{cost.total:.3f}",
            cost.attention_device,
            cost.ffn_device,
        )
    console.print(table)
    priced = {(cost.model, cost.context) for cost in found}
    for name, size in ((name, size) for size in sizes for name in names):
        if (name, size) not in priced:
            console.print(f"{name}: no figures at {size} tokens")
    console.print()
    table = _table(f"devices; attention apart from the FFN of {step3.name}, share {share:g}", "device")
    for column in ("U_flop $", "U_byte $", "dense batch", "MoE batch", "MB a layer", "least share"):
        table.add_column(column, justify="right")
    for row in devices:
        table.add_row(
            row["device"],
            *(f"{row[name]:.2e}" for name in ("per_flop", "per_byte")),
            *(f"{row[name]:.0f}" for name in ("dense_batch", "moe_batch")),
            f"{row['transfer_bytes'] / 1e6:.1f}",
            f"{row['least_share']:.3f}",
        )
    console.print(table)
    if json_file is not None:
        told_all = {"costs": [cost.as_dict() for cost in found], "devices": devices}
        json_file.write_text(json.dumps(told_all, indent=1, allow_nan=False))


def _table(title: str, first: str) -> Table:
    table = Table(title=title, box=None, header_style="bold")
    table.add_column(first)
    return table
