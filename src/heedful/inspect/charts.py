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
    most = tick * max(1, math.ceil(max(values) / tick - 1e-9)) if top is None else top
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


MORE, LESS = "#d95f02", "#2b6cb0"  # what raises a number, and what lowers it


def signed(x: float, most: float) -> str:
    """How a cell of score x is filled, where `most` is the largest there is."""
    share = min(1.0, abs(x) / (most or 1.0))
    return f'fill="{MORE if x >= 0 else LESS}" fill-opacity="{0.03 + 0.97 * share:.3f}"'


def _cell(x: float, y: float, width: float, height: float, look: str, hint: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}" rx="2" {look}>'
        f"<title>{escape(hint)}</title></rect>"
    )


def _below(names: Sequence[str], left: float, step: float, y: float) -> list[str]:
    """Slanted names below columns."""
    places = [left + (c + 0.5) * step + 3 for c in range(len(names))]
    return [
        _text(x, y + 12, name, "end", f'transform="rotate(-40 {x:.1f} {y + 12:.1f})"')
        for x, name in zip(places, names, strict=True)
    ]


def signed_heat(
    table: np.ndarray, rows: Sequence[str], columns: Sequence[str], label: str, *, fixed: Sequence[bool]
) -> Markup:
    """Scores by row, orange above 0, blue below, each scaled to its row's largest; `fixed` ones are grey."""
    left, top, tall, foot = 142.0, 6.0, 26.0, 62.0
    wide = float(np.clip(880 / max(1, len(columns)), 13, 62))
    most = np.abs(np.where(fixed, 0.0, table)).max(1)
    parts = []
    for r, name in enumerate(rows):
        parts.append(_text(left - 9, top + tall * (r + 0.5) + 4, name, "end"))
        for c, told in enumerate(columns):
            x = float(table[r, c])
            look = 'fill="#eceef1"' if fixed[c] else signed(x, float(most[r]))
            hint = f"{name}, {told}: {x:+.3g}{' (always there)' if fixed[c] else ''}"
            parts.append(_cell(left + c * wide, top + r * tall, wide, tall, look, hint))
    y = top + tall * len(rows)
    parts += _below(columns, left, wide, y)
    return _svg(left + wide * len(columns) + 10, y + foot, parts, label)


def matrix(table: np.ndarray, names: Sequence[str], label: str) -> Markup:
    """How far each agrees with each, from -1, blue, to 1, orange."""
    left, top, wide, tall, foot = 142.0, 6.0, 54.0, 30.0, 96.0
    parts = []
    for r, name in enumerate(names):
        parts.append(_text(left - 9, top + tall * (r + 0.5) + 4, name, "end"))
        for c, other in enumerate(names):
            x = float(table[r, c])
            look = 'fill="#f4f5f7"' if r == c else signed(x, 1.0)
            hint = f"{name} and {other}: {x:.2f}"
            parts.append(_cell(left + c * wide, top + r * tall, wide, tall, look, hint))
            if r != c:
                ink = ' class="light"' if abs(x) > 0.6 else ""
                parts.append(_text(left + (c + 0.5) * wide, top + tall * (r + 0.5) + 4, f"{x:.2f}", more=ink))
    y = top + tall * len(names)
    parts += _below(names, left, wide, y)
    return _svg(left + wide * len(names) + 10, y + foot, parts, label)


def lines(curves: Sequence[tuple[str, str, np.ndarray]], across: str, label: str) -> Markup:
    """(name, colour, values) over shares from 0 to 1, evenly; without a colour a line is dashed and grey."""
    width, height, left, right, bottom, top = 326.0, 250.0, 34.0, 22.0, 38.0, 10.0
    low = min(0.0, *(float(values.min()) for *_, values in curves))
    high = max(1.0, *(float(values.max()) for *_, values in curves))

    def place(share: float, x: float) -> tuple[float, float]:
        down = (high - x) / (high - low)
        return left + share * (width - left - right), top + down * (height - top - bottom)

    parts = []
    for x in (0.0, 0.5, 1.0):
        _, y = place(0, x)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 3.5, f"{x:g}", "end"))
        parts.append(_text(place(x, 0)[0], height - bottom + 15, f"{100 * x:.0f} %"))
    parts.append(_text((left + width - right) / 2, height - 6, across))
    dots = []
    for name, colour, values in curves:
        shares = np.linspace(0, 1, len(values))
        points = [place(float(share), float(v)) for share, v in zip(shares, values, strict=True)]
        look = f'stroke="{colour}"' if colour else 'stroke="#8a9099" stroke-dasharray="4 3"'
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" {look} stroke-width="2"/>')
        for (x, y), share, v in zip(points, shares, values, strict=True):
            hint = escape(f"{name}, {100 * share:.0f} %: {v:.2f}")
            dots.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="transparent"><title>{hint}</title></circle>'
            )
    return _svg(width, height, parts + dots, label)
