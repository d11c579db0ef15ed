"""Write the table of names in the README anew: python scripts/readme_names.py"""

from __future__ import annotations

from pathlib import Path

from heedful.models import named
from heedful.registry import index

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "| kind | names |\n|---|---|\n", "\nPatterns: "
KINDS = {
    "sequence": "sequence mixers",
    "grid": "grid mixers (images, video)",
    "channel": "channel mixers",
    "pool": "pool mixers",
    "cross": "cross mixers (two sets)",
    "multivariate": "multivariate mixers",
    "model": "model families",
    "pattern": "patterns of papers",
    "routing": "routing rules",
    "op": "operators",
    "bias": "biases",
    "cache": "cache policies",
    "steer": "interventions",
    "convert": "conversions",
    "inspect": "inspection",
    "parallel": "parallelism",
    "bench": "experiments",
}


def table() -> str:
    rows = []
    for kind, title in KINDS.items():
        names = sorted(e.name for e in index().values() if e.kind == kind)
        if names:
            rows.append(f"| {title} | {', '.join(f'`{name}`' for name in names)} |")
    rows.append(f"| published models | {len(named.list())} named configurations: `heedful models` |")
    return "\n".join(rows) + "\n"


text = README.read_text(encoding="utf-8")
before, rest = text.split(BEGIN)
README.write_text(before + BEGIN + table() + END + rest.split(END, 1)[1], encoding="utf-8")
