"""The papers and what each became: `papers/*.toml` joined with the registry. Loads no mechanism."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path

from heedful.catalogue.paper import Became, Paper, bibtex
from heedful.registry import Entry, index

__all__ = ["Became", "Paper", "also", "bibtex", "entries", "find", "of_paper", "paper", "papers"]


@functools.cache
def papers() -> dict[str, Paper]:
    """All papers by the key of their card."""
    files = sorted((Path(__file__).parent / "papers").glob("*.toml"))
    return {file.stem: Paper.read(file) for file in files}


def paper(key: str) -> Paper:
    """The paper with this card key; a ValueError with the nearest keys if there is none."""
    if key in papers():
        return papers()[key]
    near = difflib.get_close_matches(key, papers(), n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"the catalogue has no paper {key!r}{hint}")


def entries(*, tag: str | None = None, kind: str | None = None) -> list[Entry]:
    """What is registered, by name; filtered by tag and kind. ValueError if no entry has that tag or kind."""
    found = sorted(index().values(), key=lambda e: e.name)
    for what, wanted, known in (
        ("tag", tag, {t for e in found for t in e.tags}),
        ("kind", kind, {e.kind for e in found}),
    ):
        if wanted is not None and wanted not in known:
            raise ValueError(f"{what} is {wanted!r}, must be one of {', '.join(sorted(known))}")
    return [e for e in found if (tag is None or tag in e.tags) and (kind is None or e.kind == kind)]


def of_paper(key: str) -> list[Entry]:
    """What a paper became, in the order of its file; then what else names the paper."""
    known = index()
    told = [b.name for b in papers()[key].became if b.name in known] if key in papers() else []
    rest = sorted(e.name for e in known.values() if e.paper == key and e.name not in told)
    return [known[name] for name in (*told, *rest)]


def find(name: str) -> Entry:
    """The entry of a registered name, an alias or a card's key.

    A card's key that is no name gives the first thing that paper became. ValueError with the nearest
    names and keys if there is none.
    """
    known = index()
    aliases = {alias: e for e in known.values() for alias in e.aliases}
    for table in (known, aliases):
        if name in table:
            return table[name]
    if found := of_paper(name):
        return found[0]
    keys = [key for key in papers() if of_paper(key)]
    near = difflib.get_close_matches(name, sorted({*known, *aliases, *keys}), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "`heedful list` shows what there is"
    raise ValueError(f"nothing is called {name!r}; {hint}")


def also(entry: Entry) -> list[str]:
    """Aliases, the other registered names of the same paper, and other papers that became this entry."""
    names = [e.name for e in of_paper(entry.paper)] if entry.paper else []
    keys = [p.key for p in papers().values() if entry.name in (b.name for b in p.became)]
    found = dict.fromkeys((*entry.aliases, *names, *keys))
    return [name for name in found if name not in (entry.name, entry.paper)]
