"""What a conversion changed, and what it costs before and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Cost:
    """Of one attention module.

    what           its heads, in words
    parameters     numbers it learns
    cache_bytes    kept for each token while decoding; 0 in an encoder
    multiply_adds  of one token that sees `Report.context` tokens, in products of matrices
    """

    what: str
    parameters: int
    cache_bytes: int
    multiply_adds: int


@dataclass(frozen=True)
class Change:
    """One attention module before and after."""

    module: str
    before: Cost
    after: Cost


@dataclass(frozen=True)
class Report:
    """A conversion, module by module. Printed, it is a short table; `as_dict` gives everything.

    what        the conversion
    changes     the modules that became others
    parameters  of the whole model, before and after
    context     tokens that a token sees in `Cost.multiply_adds`
    """

    what: str
    changes: tuple[Change, ...]
    parameters: tuple[int, int]
    context: int

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """A token's, in all changed modules, before and after."""
        return self._total("cache_bytes")

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """A token's, in all changed modules, before and after."""
        return self._total("multiply_adds")

    def followed_by(self, later: Report) -> Report:
        """One report of two conversions of the same modules, one after the other."""
        after = {change.module: change.after for change in later.changes}
        changes = tuple(Change(c.module, c.before, after.get(c.module, c.after)) for c in self.changes)
        whole = (self.parameters[0], later.parameters[1])
        return Report(f"{self.what}, {later.what}", changes, whole, self.context)

    def _total(self, name: str) -> tuple[int, int]:
        before = sum(getattr(c.before, name) for c in self.changes)
        return before, sum(getattr(c.after, name) for c in self.changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, as for JSON."""
        return asdict(self) | {"cache_bytes": self.cache_bytes, "multiply_adds": self.multiply_adds}

    def table(self) -> Table:
        """The table that is printed."""
        title = f"{self.what} (multiply-adds of a token that sees {self.context})"
        table = Table(title=title, title_justify="left", box=None, header_style="bold")
        for column in ("module", "before", "after"):
            table.add_column(column, no_wrap=True)
        for column in ("parameters", "cache bytes a token", "multiply-adds a token"):
            table.add_column(column, justify="right")
        for c in self.changes:
            table.add_row(
                c.module,
                c.before.what,
                c.after.what,
                _pair(c.before.parameters, c.after.parameters),
                _pair(c.before.cache_bytes, c.after.cache_bytes),
                _pair(c.before.multiply_adds, c.after.multiply_adds),
            )
        totals = (self.parameters, self.cache_bytes, self.multiply_adds)
        table.add_row("whole model", "", "", *(_pair(*pair) for pair in totals), style="bold")
        return table

    def __str__(self) -> str:
        console = Console(width=140)
        with console.capture() as text:
            console.print(self.table())
        return text.get().rstrip()


def _pair(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} > {after:,}"
