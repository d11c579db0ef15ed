"""Which mixers are compared, with which arguments, and on which tasks each can stand."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from heedful import registry
from heedful.bench.hosts import ImageHost, OnGrid, SequenceHost
from heedful.bench.tasks import Images, Recall, Task, Text
from heedful.registry import Entry

BASELINE = "self-attention"
HEADS = 4

# Compared unless the user says otherwise: one mechanism of each idea.
DEFAULT = (
    BASELINE,
    "sqa",
    "gated-attention",
    "faster-neighborhood-attention",
    "lightning-attention-2",
    "agent-attention",
    "biformer",
    "metaformer-poolformer",
    "eca",
    "ggem",
)


@dataclass(frozen=True)
class Choice:
    """A mixer by name, with the constructor arguments that the user set."""

    entry: Entry
    given: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        arguments = ",".join(f"{key}={_text(value)}" for key, value in self.given)
        return f"{self.entry.name}:{arguments}" if arguments else self.entry.name

    @property
    def is_baseline(self) -> bool:
        return self.entry.name == BASELINE and not self.given

    def arguments(self, *, dim: int, causal: bool, side: int | None) -> dict[str, Any]:
        """Keyword arguments of the constructor: the defaults, fitted to the size, and what the user set.

        side: side of the image grid; None for a sequence.
        """
        signature = inspect.signature(self.entry.load()).parameters
        arguments: dict[str, Any] = {"dim": dim}
        if "heads" in signature:
            arguments["heads"] = HEADS
        if self.entry.causal == "optional" and signature["causal"].default != causal:
            arguments["causal"] = causal
        if side is not None:
            arguments |= _fitted(signature, side)
        return arguments | dict(self.given)

    def code(self, arguments: dict[str, Any]) -> str:
        """The line of Python that creates the mixer."""
        listed = "".join(f", {key}={value!r}" for key, value in arguments.items())
        return f"heedful.create({self.entry.name!r}{listed})".replace("'", '"')

    def refusal(self, task: Task) -> str | None:
        """Why the mixer cannot do the task; None if it can."""
        e = self.entry
        forward = inspect.signature(e.load().forward).parameters
        needed = [
            n for n in e.extra_inputs if n not in forward or forward[n].default is inspect.Parameter.empty
        ]
        if needed:
            return f"{e.name} needs {' and '.join(needed)} beside x, which the task {task.name} lacks"
        if e.kind not in ("sequence", "grid", "channel", "pool"):
            return f"{e.name} is a {e.kind} mixer; the task {task.name} has one set of tokens"
        if isinstance(task, Images):
            if e.kind in ("grid", "channel") and 2 not in e.spatial:
                return f"{e.name} takes maps with {_or(e.spatial)} spatial axes; images have 2"
            if e.causal == "always":
                return f"{e.name} always hides what comes later; the task images has no later and earlier"
            return None
        wanted = f"the task {task.name} needs a causal sequence mixer"
        if e.kind == "channel":
            return f"{e.name} mixes channels; {wanted}"
        if e.kind == "pool":
            return f"{e.name} turns a set into one vector; {wanted}"
        if e.kind == "grid" and 1 not in e.spatial:
            return f"{e.name} takes maps with {_or(e.spatial)} spatial axes; {wanted}"
        if e.causal == "never":
            return f"{e.name} sees the future; {wanted}"
        return None

    def mixer(self, *, dim: int, causal: bool, side: int | None) -> nn.Module:
        """The mixer, as a module on tokens (b, n, c)."""
        mixer = self.entry.load()(**self.arguments(dim=dim, causal=causal, side=side))
        if self.entry.kind in ("grid", "channel"):
            return OnGrid(mixer, axes=1 if side is None else 2)
        return mixer

    def host(self, task: Task, *, dim: int, depth: int) -> nn.Module:
        """The network of the task with this mixer in it."""
        if isinstance(task, Images):
            return ImageHost(
                task, dim, depth, lambda: self.mixer(dim=dim, causal=False, side=task.side), self.entry.kind
            )
        assert isinstance(task, Recall | Text)
        return SequenceHost(task, dim, depth, lambda: self.mixer(dim=dim, causal=True, side=None))


def _fitted(signature: Mapping[str, inspect.Parameter], side: int) -> dict[str, Any]:
    """Sizes for a grid of side x side: its own size, and what replaces defaults made for larger maps."""

    def default(name: str) -> int:
        value = signature[name].default if name in signature else 0
        return value if isinstance(value, int) else 0

    fitted: dict[str, Any] = {}
    if "size" in signature:
        fitted["size"] = (side, side)
    if default("window") > side:
        fitted["window"] = side - 1 + side % 2  # odd, so that it has a middle
    if default("regions") and side % default("regions"):
        fitted["regions"] = max(d for d in range(1, default("regions") + 1) if side % d == 0)
    if default("agents") > side**2 // 4:
        fitted["agents"] = (side // 2) ** 2
    return fitted


def parse(text: str) -> list[Choice]:
    """Choices from a list such as "dense,faster-neighborhood-attention:window=7,dilation=2,eca".

    Raises ValueError on an unknown name (with the nearest ones), on something that is not a mixer, and on
    an argument that the mixer does not have.
    """
    names: list[tuple[str, list[str]]] = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        if names and re.match(r"\w+=", piece):  # an argument of the mixer before it
            names[-1][1].append(piece)
        else:
            name, _, first = piece.partition(":")
            names.append((name, [first] if first else []))
    if not names:
        raise ValueError("no mixer is named; `heedful list` shows what there is")
    choices = [_choice(name, given) for name, given in names]
    return list({choice.label: choice for choice in choices}.values())


def default() -> list[Choice]:
    """The mixers that are compared unless the user says otherwise."""
    return [Choice(entry) for name in DEFAULT if (entry := registry.index().get(name)) is not None]


def _choice(name: str, given: list[str]) -> Choice:
    entry = registry.find(name)
    if not entry.is_mixer:
        raise ValueError(f"{name!r} is a {entry.kind}, not a mixer; `heedful list` shows what there is")
    known = [key for key in inspect.signature(entry.load()).parameters if key not in ("device", "dtype")]
    arguments = []
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or key not in known:
            raise ValueError(f"{entry.name} has no argument {key!r}; it has {', '.join(known)}")
        arguments.append((key, _value(value)))
    return Choice(entry, tuple(arguments))


def _value(text: str) -> Any:
    """A number, truth value, None, tuple such as 7x7, or else the text itself."""
    if text in ("True", "False", "None", "true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    if re.fullmatch(r"\d+(x\d+)+", text):
        return tuple(map(int, text.split("x")))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _or(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, numbers))
