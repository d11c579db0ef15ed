"""Print for every golden file of a folder its card, error and status; exit 1 if any fails."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.parity.harness import Result, golden_files, run_file

_STYLE = {"pass": "green", "fail": "bold red", "unchecked": "yellow", "missing": "dim"}


def _table(results: list[Result]) -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("file", "card", "error", "status", "reason"):
        table.add_column(column, overflow="fold" if column == "reason" else "ellipsis")
    for r in results:
        error = "" if r.error is None else f"{r.error:.1e}"
        status = f"[{_STYLE[r.status]}]{r.status}[/]"
        table.add_row(r.file, r.card, error, status, escape(r.reason.split("\n")[0][:200]))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("--golden", type=Path, required=True, metavar="DIR", help="folder of golden files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as a JSON list")
    args = parser.parse_args()
    try:
        files = golden_files(args.golden)
    except ValueError as wrong:
        parser.error(str(wrong))
    results = [run_file(path) for path in files]
    if args.json:
        # JSON has no infinity; an error without a number is told in `reason`.
        rows = [r.as_dict() | ({"error": None} if r.error == float("inf") else {}) for r in results]
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    Console(width=160 if not sys.stdout.isatty() else None).print(_table(results))
    counts = Counter(r.status for r in results)
    print(", ".join(f"{counts[s]} {s}" for s in _STYLE))
    return 1 if counts["fail"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
