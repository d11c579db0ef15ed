"""The findings as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup, escape
from PIL import Image
from torch import nn

from heedful import __version__
from heedful.inspect import charts, explanation_section
from heedful.inspect.findings import Findings, inspect_model
from heedful.inspect.head_profile import habits, lag_names
from heedful.inspect.plain_words import loss, percent, plain_words
from heedful.inspect.sample import Sample, Subject, of_ids
from heedful.inspect.views import View


@dataclass(frozen=True)
class Section:
    """A part of the page: key is its anchor, lead a sentence that says how to read it."""

    key: str
    title: str
    lead: str
    body: Markup


def report(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Sample], path: str | Path, *, tokenizer: Any = None
) -> Findings:
    """Inspect a model and write a self-contained HTML page about it; gives the findings back.

    inputs     what a tokenizer gives for one text (input_ids (1, n), ...), or samples: texts by
               `text_samples`, images by `image_sample`
    tokenizer  to write tokens as one reads them

    Raises ValueError for a model without self-attention over all tokens, or for more than one text at once.
    """
    if isinstance(inputs, Mapping):
        ids = inputs.get("input_ids")
        if ids is None or ids.shape[0] != 1:
            raise ValueError("inputs must have input_ids of one text, (1, n), or be a list of samples")
        samples = [of_ids(ids, inputs, tokenizer)]
    else:
        samples = list(inputs)
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    found = inspect_model(Subject(model, name, samples))
    write_html(found, path)
    return found


def write_html(found: Findings, path: str | Path) -> None:
    """One file with all figures, data and scripts inside it."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(files("heedful.inspect").joinpath("report.html").read_text("utf-8"))
    made = [section for make in SECTIONS if (section := make(found)) is not None]
    Path(path).write_text(
        page.render(
            name=found.subject.name,
            about=_about(found),
            sections=made,
            data=Markup(json.dumps(_data(found), separators=(",", ":")).replace("<", "\\u003c")),
            version=__version__,
        ),
        encoding="utf-8",
    )


def _about(found: Findings) -> str:
    parameters = sum(p.numel() for p in found.subject.model.parameters())
    samples = found.subject.samples
    what = "image" if found.image else "text"
    layers = f"{len(found.layers)} layers"
    if samples[0].grid is not None:
        layers += f" that attend over {samples[0].grid[0]} × {samples[0].grid[1]} patches"
    if found.others:
        layers += f" ({found.others} over other tokens are left out)"
    return (
        f"{type(found.subject.model).__name__} · {parameters:,} parameters · {layers}, "
        f"{len(found.heads)} heads · {len(samples)} {what}{'s' * (len(samples) > 1)}"
    )


def _words(found: Findings) -> Section:
    rows = "".join(f"<dt>{escape(head)}</dt><dd>{escape(text)}</dd>" for head, text in plain_words(found))
    return Section("words", "In plain words", "", Markup(f"<dl class='words'>{rows}</dl>"))


def _head_map(found: Findings) -> Section:
    count = Counter(h.habit for h in found.heads)
    legend = "".join(
        f'<button class="habit" data-habit="{habit.key}" title="{escape(habit.words)}"><i style="background:'
        f'{habit.colour}"></i>{escape(habit.label)} <b>{count[habit]}</b></button>'
        for habit in habits(found.image)
        if count[habit]
    )
    body = files("heedful.inspect").joinpath("head_map.html").read_text("utf-8")
    picture = (
        "where on the image it looks" if found.image else "who looks at whom in the example (rows at columns)"
    )
    lead = (
        f"Each tile is a head: its picture is {picture}, its colour what the head does, the bar below how "
        "much it matters. Click one to look inside."
    )
    return Section("heads", "Head map", lead, Markup(body.replace("<!-- legend -->", legend)))


def _importance(found: Findings) -> Section:
    order = sorted(range(len(found.heads)), key=lambda i: -found.heads[i].importance)[:12]
    unit = (
        "Jensen-Shannon divergence of the predictions with and without the head, in nats"
        if found.logits
        else "1 − cosine of the output with and without the head"
    )
    top = charts.bars([found.heads[i] for i in order], order, "the twelve most important heads")
    every = charts.dots(found, lambda h: h.importance, "the importance of each head")
    half = loss(found, found.least_half)
    told = Markup("<p class='note'>With the less important half of all heads silenced at once: {}.</p>")
    lead = f"The twelve heads that matter most, and all heads by layer: {unit}."
    body = Markup("<div class='pair'>{}{}</div>").format(top, every) + told.format(half)
    return Section("importance", "What matters", lead, body)


def _sinks(found: Findings) -> Section:
    parts = []
    rows = [f"layer {layer + 1}" for layer in found.layers]
    for view in found.views[:3]:
        parts.append(Markup("<h3>{}</h3>").format(view.sample.title))
        if found.image:
            parts.append(_received(view, rows))
            continue
        parts.append(Markup("<div class='wide'>"))
        received, labels = view.received[:, :60], view.sample.labels[:60]
        parts.append(charts.heat(received, rows, labels, "attention received by token", slanted=True))
        parts.append(Markup("</div>"))
    if found.peaks:
        rows_html = "".join(
            f"<tr><td>layer {p.layer + 1}</td><td>{escape(p.token)}</td><td>{p.channel}</td>"
            f"<td>{p.value:.1f}</td><td>{p.value / max(p.median, 1e-12):,.0f} ×</td></tr>"
            for p in found.peaks
        )
        parts.append(
            Markup(
                "<h3>Largest activation before each layer</h3><div class='wide'><table><tr><th></th>"
                "<th>token</th>"
                f"<th>channel</th><th>value</th><th>of the median</th></tr>{rows_html}</table></div>"
            )
        )
    lead = (
        "How much attention a token gets from each token that may see it, the mean over the heads of a layer."
    )
    if found.image:
        lead += " A picture is bright where its patches get the most; below it is how much the top one gets."
    return Section("sinks", "Sinks", lead, Markup("").join(parts))


def _received(view: View, rows: Sequence[str]) -> Markup:
    """The picture once for each layer, at most twelve of them, bright where attention comes in."""
    prefix = view.sample.prefix
    parts = []
    for i in np.unique(np.linspace(0, len(rows) - 1, min(12, len(rows))).round().astype(int)):
        received = view.received[i]
        place = prefix + int(received[prefix:].argmax())
        told = [f"{view.sample.labels[j]}: {percent(float(received[j]))}" for j in range(prefix)]
        row, column = view.sample.labels[place].split(",")
        told.append(f"row {row}, column {column}: {percent(float(received[place]))}")
        parts.append(_veiled(view.sample, received[prefix:], rows[i], *told))
    return Markup("<div class='film'>{}</div>").format(Markup("").join(parts))


def _veiled(sample: Sample, shares: np.ndarray, *caption: str) -> Markup:
    """A picture, darker where its patches have less, with lines of text below."""
    assert sample.grid is not None
    alpha = 200 * (1 - np.sqrt(shares.clip(0) / max(shares.max(), 1e-12))).reshape(sample.grid)
    veil = np.stack([np.zeros_like(alpha), alpha], axis=-1).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(veil, "LA").save(buffer, "PNG")
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    lines = Markup("<br>").join(line.replace(" %", "\xa0%") for line in caption)
    return Markup(
        '<figure class="veiled"><div><img src="{}" alt=""><img class="veil" src="{}" alt=""></div>'
        "<figcaption>{}</figcaption></figure>"
    ).format(sample.picture, address, lines)


def _distance(found: Findings) -> Section:
    bins = found.lags.shape[1]
    if found.image:
        columns = [f"{k}" for k in range(bins - 1)] + ["class etc."]
        lead = "Where attention goes by distance, in hops on the grid of patches; each dot below is a head."
    else:
        longest = max(len(s) for s in found.subject.samples)
        columns = lag_names(longest)
        lead = (
            "Where attention goes by distance in tokens: left of 0 ahead, right of it back, in % of a "
            "layer's attention. Each dot below is a head: the mean distance it looks."
        )
    rows = [f"layer {layer + 1}" for layer in found.layers]
    body = (
        Markup("<div class='wide'>")
        + charts.heat(found.lags, rows, columns, "attention by distance")
        + Markup("</div>")
        + charts.dots(found, lambda h: h.features["distance"], "mean distance of each head")
    )
    return Section("distance", "How far it looks", lead, body)


def _entropy(found: Findings) -> Section:
    lead = "From 0, all attention on one token, to 1, the same on all tokens. Each dot is a head."
    return Section(
        "entropy",
        "How sharp it is",
        lead,
        charts.dots(found, lambda h: h.features["entropy"], "entropy", top=1.0),
    )


def _rollout(found: Findings) -> Section | None:
    shown = [v for v in found.views if v.rollout is not None]
    if not shown:
        return None
    parts = []
    for view in shown:
        assert view.rollout is not None
        share = view.rollout / view.rollout.max()
        if view.sample.grid is not None:
            whose = "the class token" if view.sample.reads == slice(0, 1) else "all patches"
            caption = (view.sample.title, f"what {whose} at the top are made of")
            parts.append(_veiled(view.sample, view.rollout[view.sample.prefix :], *caption))
            continue
        words = " ".join(
            f'<span style="background:rgba(217,95,2,{0.85 * s:.2f})" title="{100 * r:.1f} %">'
            f"{escape(label)}</span>"
            for label, s, r in zip(view.sample.labels, share, view.rollout, strict=True)
        )
        parts.append(Markup(f'<p class="rolled">{words}</p>'))
    lead = (
        "Attention and residual streams of all layers multiplied: how much of the output is made from each "
        "place of the input (rollout). Attention alone; what the values carry is not in it."
    )
    return Section("rollout", "What reaches the output", lead, Markup("".join(parts)))


def _explanations(found: Findings) -> Section:
    body = explanation_section.body(found.explanations)
    return Section("reasons", "What the output rests on", explanation_section.LEAD, body)


# The page in order. A section gives None where it has nothing to show.
SECTIONS: list[Callable[[Findings], Section | None]] = [
    _words,
    _head_map,
    _importance,
    _sinks,
    _distance,
    _entropy,
    _rollout,
    _explanations,
]


def _data(found: Findings) -> dict[str, Any]:
    """What the page's script needs."""
    most = max((h.importance for h in found.heads), default=0.0) or 1.0
    return {
        "image": found.image,
        "layers": found.layers,
        "heads": [
            {
                "layer": h.layer,
                "head": h.head,
                "habit": h.habit.key,
                "label": h.habit.label,
                "words": h.habit.words,
                "colour": h.habit.colour,
                "bar": round(max(0.0, h.importance) / most, 4),
                "importance": f"{h.importance:.3g}",
                "loss": loss(found, h.importance),
                "features": {key: round(x, 4) for key, x in h.features.items()},
            }
            for h in found.heads
        ],
        "samples": [
            {
                "title": v.sample.title,
                "labels": v.sample.labels[: v.tables.shape[2]],
                "special": v.sample.special[: v.tables.shape[2]].int().tolist(),
                "rows": v.tables.shape[1],
                "columns": v.tables.shape[2],
                "grid": v.sample.grid,
                "prefix": v.sample.prefix,
                "picture": v.sample.picture,
                "cut": len(v.sample) - v.tables.shape[2],
                "tables": base64.b64encode(np.ascontiguousarray(v.tables).tobytes()).decode(),
            }
            for v in found.views
        ],
    }
