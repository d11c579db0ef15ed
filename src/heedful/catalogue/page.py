"""Everything the catalogue can say about one entry: the content of `heedful show`."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from heedful.catalogue import also, papers
from heedful.registry import Entry


def page(entry: Entry, key: str | None = None) -> dict[str, Any]:
    """What it is, how to call it, what it can and cannot do, what proves it, and where it comes from.

    key: the paper it is seen as part of, by default the one it names. Loads the mechanism's file.
    """
    source = papers().get(key or entry.paper or "")
    what = {b.name: b.what for b in source.became} if source else {}
    return entry.as_dict() | {
        "also": also(entry),
        "what": what.get(entry.name, ""),
        "doc": inspect.getdoc(entry.load()) or "",
        "signature": signature(entry),
        "call": call(entry),
        "proof": list(source.proof) if source else [],
        "limits": list(source.limits) if source else [],
        "weights_licence": source.weights_licence if source else "",
        "source": source.as_dict() if source else None,
    }


def signature(entry: Entry) -> str:
    """How it is built and, for a mixer, called: names and defaults."""
    made = entry.load()
    if not entry.is_mixer:
        return f"{entry.object}({_arguments(made)})"
    built = f'heedful.create("{entry.name}", {_arguments(made)})'
    return f"{built}.forward({_arguments(made.forward, skip=1)})"


def call(entry: Entry) -> str:
    """A few lines of Python that run as they stand."""
    made = entry.load()
    example: dict[str, Any] | None = getattr(made, "example", None)
    if example is None:
        return f"from {entry.module} import {entry.object}"
    if not entry.is_mixer:
        lines = ["import heedful, torch", f"from {entry.module} import {entry.object}"]
        lines.append(f"{entry.kind} = {entry.object}({_given(example)})")
        if entry.kind == "pattern":
            lines.append(f"q = k = v = torch.randn(1, 2, {pattern_tokens(made(**example))}, 8)")
            lines.append("y = heedful.attention(q, k, v, pattern=pattern)")
        if hasattr(made, "example_inputs"):
            inputs = made(**example).example_inputs()
            given = ", ".join(f"{name}={_literal(value)}" for name, value in inputs.items())
            lines.append(f"y = {entry.kind}({given})")
        return "\n".join(lines)
    inputs = dict(made(**example).example_inputs())
    x = inputs.pop("x")
    given = "".join(f", {name}={_literal(value)}" for name, value in inputs.items())
    return "\n".join(
        (
            "import heedful, torch",
            f'mixer = heedful.create("{entry.name}", {_given(example)})',
            f"y = mixer({_literal(x)}{given})",
        )
    )


def pattern_tokens(pattern: Any) -> int:
    """For how many tokens an example of a pattern is: those of its grid, where it has one."""
    shape = getattr(pattern, "shape", 24)
    return math.prod(shape) if isinstance(shape, tuple) else int(shape)


def _arguments(function: Any, skip: int = 0) -> str:
    parts: list[str] = []
    keyword_only = False
    for p in [*inspect.signature(function).parameters.values()][skip:]:
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        default = p.default
        stars = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        parts.append(f"{stars}{p.name}" + ("" if default is p.empty else f"={default!r}"))
    return ", ".join(parts)


def _given(example: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in example.items())


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    shape = ", ".join(map(str, value.shape))
    if value.dtype == torch.bool:
        return f"torch.ones({shape}, dtype=torch.bool)"
    if value.is_floating_point():
        return f"torch.randn({shape})"
    return f"torch.zeros({shape}, dtype={value.dtype})"
