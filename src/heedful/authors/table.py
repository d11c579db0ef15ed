"""How the authors' names and layouts become heedful's."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Table:
    """A recipe from the authors' state dictionary to heedful's.

    drop     regular expressions of names that hold nothing learned (matched whole)
    rename   (regular expression, replacement) pairs; the first that matches a name whole replaces it
    relayout a function on the renamed dictionary, for what is laid out or split differently
    """

    rename: tuple[tuple[str, str], ...] = ()
    drop: tuple[str, ...] = ()
    relayout: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    def apply(self, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The dictionary with heedful's names; a ValueError if two names become one."""
        ours: dict[str, Tensor] = {}
        for name, value in theirs.items():
            if any(re.fullmatch(pattern, name) for pattern in self.drop):
                continue
            new = self.name(name)
            if new in ours:
                raise ValueError(f"state_dict has two entries for {new!r}, one of them {name!r}")
            ours[new] = value
        return ours if self.relayout is None else self.relayout(ours)

    def name(self, theirs: str) -> str:
        """heedful's name of an authors' name."""
        for pattern, replacement in self.rename:
            if found := re.fullmatch(pattern, theirs):
                return found.expand(replacement)
        return theirs


def inside(prefix: str, table: Table) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A relayout for a model: `table`, of one of its modules, behind every match of `prefix`."""

    def relayout(state: dict[str, Tensor]) -> dict[str, Tensor]:
        ours: dict[str, Tensor] = {}
        modules: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            if found := re.match(prefix, name):
                modules.setdefault(found[0], {})[name[found.end() :]] = value
            else:
                ours[name] = value
        for place, theirs in modules.items():
            ours.update({place + name: value for name, value in table.apply(theirs).items()})
        return ours

    return relayout
