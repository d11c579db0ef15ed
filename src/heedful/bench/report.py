"""The findings as a table for the terminal and as one HTML file that needs nothing else."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.table import Table

from heedful import __version__
from heedful.bench.figures import (
    colours,
    cost_curves,
    data_address,
    influence_picture,
    quality_against_speed,
)
from heedful.bench.results import Comparison, Result
from heedful.bench.tasks import Task


def quality_text(result: Result) -> str:
    spread = f" ± {result.quality_spread:.3f}" if len(result.quality_seeds) > 1 else ""
    return f"{result.quality:.3f}{spread}"


def short(number: float) -> str:
    """Three digits and a unit: 10.6 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def in_order(results: list[Result]) -> list[Result]:
    """Best quality first."""
    return sorted(results, key=lambda r: -r.quality if r.higher_is_better else r.quality)


def table(found: Comparison, task: Task) -> Table:
    """The figures of one task; ★ marks the Pareto-optimal rows, bold the recommended one."""
    made = Table(title=f"{task.name}: {task.about}", title_justify="left", title_style="bold")
    made.add_column("mixer", no_wrap=True)
    better = "↑" if task.measure.higher_is_better else "↓"
    for heading in (f"{task.measure.name} {better}", f"{task.unit}/s", "memory MiB", "parameters",
                    f"FLOPs/{task.unit[:-1]}"):  # fmt: skip
        made.add_column(heading, justify="right")
    for r in in_order(found.of(task)):
        made.add_row(
            f"{r.label} {'★' if r.pareto else ''}",
            quality_text(r),
            f"{r.throughput:,.0f}",
            "–" if r.peak_memory_mib is None else f"{r.peak_memory_mib:,.1f}",
            f"{r.parameters:,}",
            short(r.flops_per_unit),
            style="bold" if r.recommended else None,
        )
    return made


def code(found: Comparison, task: Task) -> str:
    """The line that creates the recommended mixer; empty if none is."""
    return next((r.code for r in found.of(task) if r.recommended), "")


def missing(found: Comparison, task: Task) -> list[str]:
    """A line for each mixer without figures."""
    lines = [f"not run: {m.label}, {m.reason}" for m in found.not_run if m.task == task.name]
    lines += [f"failed: {m.label}, {m.reason}" for m in found.failed if m.task == task.name]
    return lines + [f"refused: {m.reason}" for m in found.refused if m.task == task.name]


def write_html(found: Comparison, path: Path) -> None:
    """One self-contained file: tables, advice, and all figures inside it."""
    colour = colours(list(dict.fromkeys(r.label for r in found.results)))
    parts = [_part(found, task, colour) for task in found.tasks]
    curves = []
    for family, title in (("sequence", "Causal sequences"), ("image", "Images")):
        own = [r for r in found.results if (r.task == "images") == (family == "image") and r.cost_curve]
        unique = list({r.label: r for r in own}.values())
        if unique:
            curves.append((title, data_address(cost_curves(unique, family, colour), "svg")))
    pictures = [
        (
            task.name,
            [
                (label, data_address(influence_picture(seen, label), "png"))
                for (label, name), seen in found.influences.items()
                if name == task.name
            ],
        )
        for task in found.tasks
        if any(name == task.name for _, name in found.influences)
    ]
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {"quality": quality_text, "short": short}
    page = environment.from_string(files("heedful.bench").joinpath("report.html").read_text("utf-8"))
    path.write_text(
        page.render(found=found, parts=parts, curves=curves, pictures=pictures, version=__version__),
        encoding="utf-8",
    )


def _part(found: Comparison, task: Task, colour: dict[str, str]) -> dict[str, Any]:
    results = in_order(found.of(task))
    scatter = data_address(quality_against_speed(results, task, colour), "svg") if results else ""
    return {
        "task": task,
        "results": results,
        "steps": results[0].steps if results else 0,
        "advice": found.advice[task.name],
        "code": code(found, task),
        "missing": missing(found, task),
        "scatter": scatter,
    }
