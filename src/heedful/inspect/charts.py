"""Small SVG charts for the page, with the numbers in them as tooltips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup, escape

from heedful.inspect.findings import Findings, Head


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: object, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def dots(found: Findings, value: Callable[[Head], float], label: str, *, top: float | None = None) -> Markup:
    """One dot a head, layers from left to right; the line joins the layers' means. A click selects a head."""
    width, height, left, bottom = 520.0, 250.0, 46.0, 34.0
    values = [value(h) for h in found.heads]
    tick = _round_step(max(values) if top is None else top)
    most = tick * math.ceil(max(values) / tick - 1e-9) if top is None else top
    ticks = [tick * i for i in range(round(most / tick) + 1)]
    step = (width - left - 10) / len(found.layers)

    def place(layer: int, x: float) -> tuple[float, float]:
        return left + step * (found.layers.index(layer) + 0.5), height - bottom - x / most * (
            height - bottom - 12
        )

    parts = []
    for x in ticks:
        _, y = place(found.layers[0], x)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 6}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 3.5, f"{x:.3g}", "end"))
    means = []
    for layer in found.layers:
        own = found.of_layer(layer)
        x, y = place(layer, sum(value(h) for h in own) / len(own))
        means.append(f"{x:.1f},{y:.1f}")
        parts.append(_text(x, height - bottom + 15, layer + 1))
    parts.append(_text(left + (width - left) / 2, height - 3, "layer"))
    parts.append(f'<polyline class="mean" points="{" ".join(means)}"/>')
    for i, head in enumerate(found.heads):
        x, y = place(head.layer, value(head))
        heads = len(found.of_layer(head.layer))
        x += (head.head - (heads - 1) / 2) * min(6.0, step * 0.7 / heads)
        told = f"layer {head.layer + 1}, head {head.head + 1}: {value(head):.3g} ({head.habit.label})"
        parts.append(
            f'<circle class="pick" data-head="{i}" cx="{x:.1f}" cy="{y:.1f}" r="4" '
            f'fill="{head.habit.colour}"><title>{escape(told)}</title></circle>'
        )
    return _svg(width, height, parts, label)


def _round_step(most: float) -> float:
    """A step of 1, 2 or 5 times a power of ten, of which three to seven reach `most`."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most / 3))
    return max(step for step in (power, 2 * power, 5 * power) if step <= most / 3 * (1 + 1e-9))


def heat(
    table: np.ndarray, rows: Sequence[str], columns: Sequence[str], label: str, *, slanted: bool = False
) -> Markup:
    """A table of shares, darker for more."""
    left, top = 66.0, 8.0
    cell = float(np.clip(860 / max(1, len(columns)), 9, 56))
    tall = 24.0
    foot = 64.0 if slanted else 22.0
    most = float(table.max()) or 1.0
    parts = []
    for r, name in enumerate(rows):
        parts.append(_text(left - 8, top + tall * (r + 0.5) + 4, name, "end"))
        for c, told in enumerate(columns):
            x = float(table[r, c])
            parts.append(
                f'<rect x="{left + c * cell:.1f}" y="{top + r * tall:.1f}" width="{cell - 1:.1f}" '
                f'height="{tall - 1:.1f}" rx="2" fill="#d95f02" fill-opacity="{0.03 + 0.97 * x / most:.3f}">'
                f"<title>{escape(name)}, {escape(told)}: {100 * x:.1f} %</title></rect>"
            )
            if cell >= 30 and x >= 0.005:
                ink = ' class="light"' if x > 0.6 * most else ""
                parts.append(
                    _text(left + (c + 0.5) * cell, top + tall * (r + 0.5) + 4, f"{100 * x:.0f}", more=ink)
                )
    y = top + tall * len(rows)
    for c, told in enumerate(columns):
        x = left + (c + 0.5) * cell
        if slanted:
            parts.append(
                _text(x + 3, y + 12, told, "end", f'transform="rotate(-40 {x + 3:.1f} {y + 12:.1f})"')
            )
        else:
            parts.append(_text(x, y + 15, told))
    return _svg(left + cell * len(columns) + 10, y + foot, parts, label)


def bars(heads: Sequence[Head], numbers: Sequence[int], label: str) -> Markup:
    """The importance of some heads; a click selects one."""
    width, row, left = 520.0, 22.0, 128.0
    most = max((h.importance for h in heads), default=0.0) or 1.0
    parts = []
    for r, (head, i) in enumerate(zip(heads, numbers, strict=True)):
        y = r * row
        size = max(1.0, head.importance / most * (width - left - 70))
        parts.append(_text(left - 8, y + 15, f"layer {head.layer + 1}, head {head.head + 1}", "end"))
        parts.append(
            f'<rect class="pick" data-head="{i}" x="{left}" y="{y + 4:.1f}" width="{size:.1f}" '
            f'height="{row - 7:.1f}" rx="2" fill="{head.habit.colour}"><title>{escape(head.habit.words)}'
            "</title></rect>"
        )
        parts.append(_text(left + size + 6, y + 15, f"{head.importance:.3g}", "start"))
    return _svg(width, row * len(heads) + 4, parts, label)
