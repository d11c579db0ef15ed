"""One paper of the catalogue: what it is, what it became in heedful, and what proves it."""

from __future__ import annotations

import re
import tomllib
import unicodedata
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Became:
    """A registered name, and what it is of the paper."""

    name: str
    what: str


@dataclass(frozen=True)
class Paper:
    """A file papers/<key>.toml.

    kind            mechanism, model, benchmark, ...
    became          what it is in heedful
    proof           test files and golden files
    limits          what of the paper heedful does not do, or does differently
    weights_licence licence of the authors' weights, where known
    """

    key: str
    title: str
    year: int
    kind: str
    authors: tuple[str, ...] = ()  # "Family, Given"
    venue: str = ""
    arxiv: str = ""
    became: tuple[Became, ...] = ()
    proof: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    weights_licence: str = ""

    @classmethod
    def read(cls, path: Path) -> Paper:
        """Read a TOML file; a ValueError that names the file if a field is unknown, missing or mistyped."""
        told: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(cls)} - {"key"}
        if unknown := sorted(set(told) - known):
            raise ValueError(f"{path.name} has fields {unknown}, must have only {sorted(known)}")
        if missing := [name for name in ("title", "year", "kind") if name not in told]:
            raise ValueError(f"{path.name} lacks {', '.join(missing)}")
        told["became"] = tuple(Became(**part) for part in told.get("became", ()))
        for name in ("authors", "proof", "limits"):
            if not isinstance(given := told.get(name, []), list):
                raise ValueError(f"{name} in {path.name} is {given!r}, must be a list of strings")
            told[name] = tuple(given)
        return cls(key=path.stem, **told)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bibtex": bibtex(self)}


def bibtex(paper: Paper) -> str:
    """The paper as a BibTeX entry; its key is vaswani2017, or the card's key where authors are not known."""
    rows = {
        "title": "{" + _tex(paper.title) + "}",  # inner braces keep capitals
        "author": " and ".join(_tex(a) for a in paper.authors),
        "year": str(paper.year),
        "howpublished": _tex(paper.venue),
        "eprint": paper.arxiv,
        "archiveprefix": "arXiv" if paper.arxiv else "",
    }
    lines = [f"  {name} = {{{text}}}" for name, text in rows.items() if text]
    return f"@misc{{{_bibtex_key(paper)},\n" + ",\n".join(lines) + "\n}"


def _bibtex_key(paper: Paper) -> str:
    if not paper.authors:
        return paper.key
    family = paper.authors[0].split(",")[0]
    plain = unicodedata.normalize("NFKD", family).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z]", "", plain.lower()) + str(paper.year)


def _tex(text: str) -> str:
    return re.sub(r"([&%#_$])", r"\\\1", text)
