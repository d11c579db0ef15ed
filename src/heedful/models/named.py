"""Named configurations: `create("biformer_tiny")`.

A file of this room that holds published configurations has a literal table

    CONFIGS = {
        "biformer_tiny": {"parameters": 13_142_760, "flops": "2.2G", "arguments": {"depths": (2, 2, 8, 2)}},
    }

for its registered class; "object" names the class where a file has several. parameters is the exact count;
flops the published multiply-adds, to as many digits as were published; size the side of the image.
The tables are read from the source text, as the registry is, so that listing loads no model.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from heedful.registry import Entry, configurations, index


@dataclass(frozen=True)
class Named:
    """A published configuration of a model class."""

    name: str
    family: str  # the registered name of the class
    arguments: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    flops: str | None = None  # published multiply-adds, e.g. "2.2G"
    size: int = 224  # side of the image, in pixels

    @property
    def entry(self) -> Entry:
        return index()[self.family]


def find(name: str) -> Named:
    """The configuration of this name; a ValueError with the nearest names if there is none."""
    if name in (known := _table()):
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "`heedful models` shows what there is"
    raise ValueError(f"no model is called {name!r}; {hint}")


def list(*, family: str | None = None) -> Sequence[Named]:
    """All named configurations, by name; of one family where asked."""
    return [named for _, named in sorted(_table().items()) if family in (None, named.family)]


def create(name: str, **arguments: Any) -> nn.Module:
    """Build a published configuration, with randomly initialised parameters.

    name       e.g. "biformer_tiny"
    arguments  of the constructor, in place of the published ones: classes=10, features_only=True ...

    Raises ValueError if the name is unknown (with the nearest names) or an argument is none of the model's.
    """
    named = find(name)
    made = named.entry.load()
    known = inspect.signature(made).parameters
    for argument in arguments:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1) or [*known]
            raise ValueError(f"{argument} is no argument of {name!r}; did you mean {', '.join(near)}?")
    return made(**{**named.arguments, **arguments})


@functools.cache
def _table() -> dict[str, Named]:
    found: dict[str, Named] = {}
    objects = {(e.path, e.object): e.name for e in index().values() if e.kind == "model"}
    root = Path(__file__).parent
    for file in sorted(root.glob("*.py")):
        path = str(file.relative_to(root.parents[1]))
        registered = [name for (at, _), name in objects.items() if at == path]
        for name, told in configurations(file.read_text(encoding="utf-8")).items():
            told = dict(told)
            cls = told.pop("object", None)
            family = registered[0] if cls is None else objects[path, cls]
            if name in found:
                raise ValueError(f"{name!r} is configured twice: {found[name].family}, {family}")
            found[name] = Named(name, family, **told)
    return found
