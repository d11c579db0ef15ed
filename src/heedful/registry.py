"""Names to mechanisms, without loading any mechanism.

A mechanism declares itself where it stands, with a decorator whose arguments are literals:

    @register("sqa", kind="sequence", paper="sqa", tags=("heads",), causal="optional", cross=True)
    class SparseQueryAttention(Mixer): ...

The index of heedful's own mechanisms is read from the source text of those decorators, so that
listing loads no mechanism file and adding one touches nothing central. Classes of other packages
enter the same index when their module runs the decorator.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MIXER_KINDS = ("sequence", "grid", "channel", "pool", "cross", "multivariate")
OTHER_KINDS = (
    "pattern",
    "routing",
    "bias",
    "op",
    "model",
    "cache",
    "steer",
    "inspect",
    "convert",
    "parallel",
    "bench",
)
CAUSAL = ("never", "optional", "always")


@dataclass(frozen=True)
class Entry:
    """What a mechanism declares of itself.

    causal says whether the future can be hidden: "never", "optional" (an argument `causal`), "always".
    exempt maps a conformance check to the reason why it does not apply.
    """

    name: str
    kind: str
    paper: str | None = None
    tags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    causal: str = "never"
    cross: bool = False
    decode: bool = False
    spatial: tuple[int, ...] = ()  # numbers of spatial axes a grid or channel mixer takes
    complexity: str = ""
    extra_inputs: tuple[str, ...] = ()
    exempt: dict[str, str] = field(default_factory=dict)
    module: str = ""
    object: str = ""
    path: str = ""
    summary: str = ""

    def __post_init__(self) -> None:
        if self.kind not in MIXER_KINDS + OTHER_KINDS:
            raise ValueError(
                f"kind of {self.name!r} is {self.kind!r}, must be one of {MIXER_KINDS + OTHER_KINDS}"
            )
        if self.causal not in CAUSAL:
            raise ValueError(f"causal of {self.name!r} is {self.causal!r}, must be one of {CAUSAL}")

    @property
    def is_mixer(self) -> bool:
        return self.kind in MIXER_KINDS

    def load(self) -> Any:
        """The class or function itself; imports its file."""
        if (self.module, self.object) in _runtime_objects:
            return _runtime_objects[self.module, self.object]
        return getattr(importlib.import_module(self.module), self.object)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_runtime: dict[str, Entry] = {}
_runtime_objects: dict[tuple[str, str], Any] = {}


def register(name: str, *, kind: str, **declared: Any) -> Callable[[T], T]:
    """Class decorator: make a mechanism known by name (see `Entry` for what can be declared).

    Works for classes outside heedful too; they appear in `list_mixers` once their module is imported.
    """

    def decorate(obj: T) -> T:
        module, qualname = obj.__module__, obj.__qualname__  # type: ignore[attr-defined]
        summary = (obj.__doc__ or "").strip().split("\n")[0]
        entry = Entry(name, kind, module=module, object=qualname, summary=summary, **declared)
        obj.entry = entry  # type: ignore[attr-defined]
        if not module.startswith("heedful."):
            for key in (name, *entry.aliases):
                known = index().get(key)
                if known is not None and (known.module, known.object) != (module, qualname):
                    raise ValueError(f"name {key!r} is taken by {known.module}.{known.object}")
            _runtime[name] = entry
            _runtime_objects[module, qualname] = obj
        return obj

    return decorate


@functools.cache
def _source_index() -> dict[str, Entry]:
    root = Path(__file__).parent
    found: dict[str, Entry] = {}
    for file in sorted(root.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "@register(" not in text or file == Path(__file__):
            continue
        module = ".".join(("heedful", *file.relative_to(root).with_suffix("").parts))
        configs = configurations(text)
        for node in ast.parse(text).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "register":
                    declared = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
                    if declared["kind"] == "model":
                        names = [
                            n for n, told in configs.items() if told.get("object", node.name) == node.name
                        ]
                        known = dict.fromkeys((*declared.get("aliases", ()), *names))
                        own = ast.literal_eval(call.args[0])  # a configuration may have its family's name
                        declared["aliases"] = tuple(alias for alias in known if alias != own)
                    entry = Entry(
                        ast.literal_eval(call.args[0]),
                        module=module,
                        object=node.name,
                        path=str(file.relative_to(root.parent)),
                        summary=(ast.get_docstring(node) or "").split("\n")[0],
                        **declared,
                    )
                    if entry.name in found:
                        raise ValueError(
                            f"{entry.name!r} is registered twice: {found[entry.name].path}, {file}"
                        )
                    found[entry.name] = entry
    return found


def configurations(text: str) -> dict[str, dict[str, Any]]:
    """The literal table CONFIGS of a model file's source text (see `heedful.models.named`)."""
    if "\nCONFIGS" not in text:
        return {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(getattr(target, "id", "") == "CONFIGS" for target in targets):
                return ast.literal_eval(node.value)
    return {}


def index() -> dict[str, Entry]:
    """All entries by name."""
    return {**_source_index(), **_runtime}


def find(name: str) -> Entry:
    """The entry of a name or alias; a ValueError with the nearest names if there is none."""
    entries = index()
    if name in entries:
        return entries[name]
    aliases = {alias: entry for entry in entries.values() for alias in entry.aliases}
    if name in aliases:
        return aliases[name]
    near = difflib.get_close_matches(name, [*entries, *aliases], n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else "; `heedful list` shows what there is"
    raise ValueError(f"no mechanism is called {name!r}{hint}")


def list_mixers(*, kind: str | None = None, tag: str | None = None, paper: str | None = None) -> list[str]:
    """Names of the registered mixers, sorted; filtered by kind, tag or card key."""
    return sorted(
        e.name
        for e in index().values()
        if e.is_mixer
        and (kind is None or e.kind == kind)
        and (tag is None or tag in e.tags)
        and (paper is None or e.paper == paper)
    )


def create(name: str, *args: Any, **kwargs: Any) -> Any:
    """Build a mixer by name: `create("sqa", dim=64, heads=8)`.

    Raises ValueError if the name is unknown (with the nearest names) or is not a mixer.
    """
    entry = find(name)
    if not entry.is_mixer:
        raise ValueError(f"{name!r} is a {entry.kind}, not a mixer; use {entry.module}.{entry.object}")
    return entry.load()(*args, **kwargs)
