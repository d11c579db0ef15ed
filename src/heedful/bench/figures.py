"""The figures of the comparison report, as SVG or PNG in data: addresses."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from heedful.bench.influence import Influence
from heedful.bench.results import Result
from heedful.bench.tasks import Task

GREY, ORANGE = "#8a8f98", "#d95f02"
HEAT = "magma_r"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555",
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
}


def data_address(figure: Figure, kind: str) -> str:
    """The figure as a data: address of kind "svg" or "png"."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    media = "svg+xml" if kind == "svg" else kind
    return f"data:image/{media};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def colours(labels: Sequence[str]) -> dict[str, str]:
    """One colour a mixer, the same in every figure; the first (dense attention) is dark grey."""
    wheel = [mpl.colors.to_hex(c) for c in (*mpl.colormaps["tab10"].colors, *mpl.colormaps["Dark2"].colors)]  # type: ignore[attr-defined]
    wheel = [c for c in wheel if c != "#7f7f7f"]
    return {label: "#333333" if i == 0 else wheel[(i - 1) % len(wheel)] for i, label in enumerate(labels)}


def quality_against_speed(results: Sequence[Result], task: Task, colour: dict[str, str]) -> Figure:
    """One point a mixer, the seeds' spread as a bar, the Pareto-optimal ones joined."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.9), layout="constrained")
        ax = figure.subplots()
        front = sorted((r for r in results if r.pareto), key=lambda r: r.throughput)
        ax.plot(
            [r.throughput for r in front], [r.quality for r in front], color=ORANGE, lw=1, ls="--", zorder=1
        )
        for r in results:
            ax.errorbar(
                r.throughput, r.quality, yerr=r.quality_spread, fmt="o", color=colour[r.label], capsize=3,
                ms=9 if r.recommended else 6, mec=ORANGE if r.pareto else "white", mew=1.4, elinewidth=1,
            )  # fmt: skip
        ax.set_xscale("log")
        _plain_ticks(ax, "x")
        ax.margins(x=0.2, y=0.16)
        ax.set_ylim(ax.get_ylim())  # what counts as learned is drawn where it is in sight
        ax.axhline(task.goal, color=GREY, lw=0.8, ls=":")
        if not task.measure.higher_is_better:
            ax.invert_yaxis()
        better = "higher" if task.measure.higher_is_better else "lower, axis reversed"
        ax.set(
            xlabel=f"training speed ({task.unit} a second)",
            ylabel=f"{task.measure.name} ({better} is better)",
            title=f"{task.name}: up and to the right is better",
        )
        _labels(ax, results, colour)
    return figure


def _labels(ax: Axes, results: Sequence[Result], colour: dict[str, str]) -> None:
    """Names beside the points, moved up or down until none lies on another."""
    taken: list[tuple[float, float, float]] = []  # left end, right end, height; in pixels
    for r in sorted(results, key=lambda r: -r.quality):
        x, y = ax.transData.transform((r.throughput, r.quality))
        width = 6.5 * len(r.label)
        leftwards = ax.transAxes.inverted().transform((x, y))[0] > 0.6  # the name must not leave the axes
        ends = (x - width, x) if leftwards else (x, x + width)
        shift = 0.0
        for step in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6):
            shift = 11.0 * step
            if all(ends[1] < u or v < ends[0] or abs(y + shift - w) > 10 for u, v, w in taken):
                break
        taken.append((*ends, y + shift))
        ax.annotate(
            r.label, (r.throughput, r.quality), (-7 if leftwards else 7, shift), textcoords="offset points",
            va="center", ha="right" if leftwards else "left", fontsize=8, color=colour[r.label],
            fontweight="bold" if r.recommended else "normal",
            arrowprops={"arrowstyle": "-", "color": "#bbb", "lw": 0.5} if shift else None,
        )  # fmt: skip


def cost_curves(results: Sequence[Result], family: str, colour: dict[str, str]) -> Figure:
    """Time and, where it is known, memory of each mixer alone against the number of tokens; log axes."""
    measures = {"time (ms)": "milliseconds", "peak memory (MiB)": "memory_mib"}
    if not any(p.memory_mib for r in results for p in r.cost_curve):
        del measures["peak memory (MiB)"]
    ticks = sorted({p.tokens for r in results for p in r.cost_curve})
    names = [str(n) if family == "sequence" else f"{round(n**0.5)}²" for n in ticks]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 4 * len(measures), 3.9), layout="constrained")
        axes = figure.subplots(1, len(measures), squeeze=False)[0]
        for ax, (label, field) in zip(axes, measures.items(), strict=True):
            for r in results:
                points = [(p.tokens, value) for p in r.cost_curve if (value := getattr(p, field))]
                x, y = zip(*points, strict=True) if points else ((), ())
                width = 2.2 if r.baseline else 1.3
                ax.plot(x, y, "o-", ms=3.5, lw=width, color=colour[r.label], label=r.label)
            what = "sequence length (tokens)" if family == "sequence" else "image size (side x side tokens)"
            ax.set(xscale="log", yscale="log", xlabel=what, ylabel=label)
            ax.set_xticks(ticks, names)
            ax.xaxis.set_minor_locator(NullLocator())
            _plain_ticks(ax, "y")
        axes[0].set_title("forward and backward of the mixer alone, one input")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure


def influence_picture(found: Influence, label: str) -> Figure:
    """The pattern if there is one, the Jacobian norms, and on images what one token draws on."""
    on_grid = found.side is not None and found.columns == "token"
    panels = (found.mask is not None) + 1 + on_grid
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(3.1 * panels, 3.2), layout="constrained")
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        if found.mask is not None:
            ax = axes.pop(0)
            shown = found.mask[: len(found.jacobian), : found.jacobian.shape[1]]
            ax.imshow(shown, cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
            ax.set(title=f"may see: {found.pattern}", xlabel="token seen", ylabel="token that sees")
        ax = axes.pop(0)
        aspect = "equal" if found.jacobian.shape[0] == found.jacobian.shape[1] else "auto"
        ax.imshow(_contrast(found.jacobian), cmap=HEAT, vmin=0, vmax=1, aspect=aspect)
        ax.set(title="draws on (trained)", xlabel=f"input {found.columns}", ylabel=f"output {found.rows}")
        if on_grid:
            assert found.side is not None
            _on_grid(axes.pop(0), found.jacobian, found.side, one=found.rows == "token")
    figure.suptitle(label, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return figure


def _on_grid(ax: Axes, jacobian: torch.Tensor, side: int, *, one: bool) -> None:
    """Where on the image the token in the middle draws on, or all outputs together."""
    middle = side // 2
    drawn = jacobian[middle * side + middle] if one else jacobian.square().sum(0).sqrt()
    ax.imshow(_contrast(drawn.view(side, side)), cmap=HEAT, vmin=0, vmax=1)
    if one:
        ax.plot(middle, middle, "s", ms=11, mfc="none", mec="#1fa187", mew=1.6)
    title = "what the marked token draws on" if one else "what the vector draws on"
    ax.set(title=title, xlabel="column", ylabel="row")


def _contrast(values: torch.Tensor) -> np.ma.MaskedArray:
    """Square root, scaled so that the strongest hundredth does not drown the rest."""
    high = values.flatten().quantile(0.99).clamp(min=1e-12) if values.numel() else values.new_ones(())
    return np.ma.masked_equal((values / high).clamp(0, 1).sqrt().numpy(), 0)  # white: no influence at all


def _plain_ticks(ax: Axes, which: str) -> None:
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if which == "y":
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_minor_formatter(FuncFormatter(_some_minor))


def _some_minor(value: float, _: object) -> str:
    first = f"{value:e}"[0]
    return f"{value:,.10g}" if first in "25" else ""
