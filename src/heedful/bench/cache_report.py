"""The findings on cache policies as a table, a sentence, a picture and an HTML file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import matplotlib as mpl
from jinja2 import Environment
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.table import Table

from heedful import __version__
from heedful.bench.cache import FULL, Comparison, Result
from heedful.bench.figures import STYLE, colours, data_address

BITS, KEYS = 0.02, 0.05  # what counts as no loss: bits per byte, and the share of keys


def table(found: Comparison) -> Table:
    """A row for each policy and budget."""
    made = Table(title=found.about, title_justify="left", title_style="bold")
    made.add_column("cache", no_wrap=True)
    for heading in (
        "bits/byte ↓",
        "keys found ↑",
        "by depth, %",
        "KiB held ↓",
        "ms a token ↓",
        "prompt, s ↓",
    ):
        made.add_column(heading, justify="right")
    for r in found.results:
        made.add_row(
            r.label,
            f"{r.bits:.3f}",
            f"{r.found:.0%}",
            " ".join(f"{100 * share:.0f}" for share in r.retrieval.values()),
            f"{r.held / 1024:.0f}",
            f"{r.milliseconds:.2f}",
            f"{r.seconds:.2f}",
            style="bold" if r is smallest(found) else None,
        )
    return made


def smallest(found: Comparison) -> Result | None:
    """The result with the fewest bytes that loses next to nothing against the full cache."""
    full = next((r for r in found.results if r.policy == FULL), None)
    if full is None:
        return None
    near = [r for r in found.results if r.bits <= full.bits + BITS and r.found >= full.found - KEYS]
    return min(near, key=lambda r: r.held)


def advice(found: Comparison) -> str:
    """What the figures say, in a sentence."""
    best = smallest(found)
    if best is None:
        return "Nothing was measured."
    full = next(r for r in found.results if r.policy == FULL)
    if full.found < 0.5:
        return (
            f"The model itself finds only {full.found:.0%} of the keys, so that retrieval says little; "
            "train it longer with --steps."
        )
    bounds = f"within {BITS} bits per byte and {KEYS:.0%} of the keys of the full cache"
    if best.held >= full.held:
        return f"No cache that holds less than the full one stays {bounds}."
    return f"{best.label} is the smallest cache {bounds}: it holds {best.held / full.held:.0%} of its bytes."


def picture(found: Comparison) -> Figure:
    """Bits per byte and keys found against the bytes held, a line for each policy."""
    names = list(dict.fromkeys(r.policy for r in found.results))
    colour = colours(names)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name in names:
            own = sorted((r for r in found.results if r.policy == name), key=lambda r: r.held)
            held = [r.held / 1024 for r in own]
            for ax, values in ((left, [r.bits for r in own]), (right, [100 * r.found for r in own])):
                if name == FULL:
                    ax.axhline(values[0], color=colour[name], lw=0.9, ls=":")
                ax.plot(held, values, "o-", ms=8 if name == FULL else 4.5, color=colour[name], label=name)
        for ax in (left, right):
            ax.set(xscale="log", xlabel="KiB held by the cache of one sequence (log)")
            held = sorted(r.held / 1024 for r in found.results)
            ticks = [2**i for i in range(31) if held[0] / 2 < 2**i < held[-1] * 2]
            ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            ax.xaxis.set_minor_locator(NullLocator())
        left.set(
            ylabel="bits per byte (lower is better, axis reversed)",
            title="text: up and to the left is better",
        )
        left.invert_yaxis()
        right.set(
            ylabel="planted keys found (%)", title="retrieval: up and to the left is better", ylim=(-4, 104)
        )
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def write_html(found: Comparison, path: Path) -> None:
    """One self-contained file."""
    environment = Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(files("heedful.bench").joinpath("cache_report.html").read_text("utf-8"))
    told = page.render(
        found=found,
        advice=advice(found),
        picture=data_address(picture(found), "svg"),
        depths=list(found.results[0].retrieval) if found.results else [],
        version=__version__,
    )
    path.write_text(told, encoding="utf-8")
