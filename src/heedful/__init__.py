"""heedful: attention mechanisms under one interface."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives; loaded on first use, so that `import heedful` stays light.
_LAZY = {
    "attention": "heedful.ops.attention",
    "merge_partials": "heedful.ops.attention",
    "linear_attention": "heedful.ops.linear",
    "FactoredBias": "heedful.ops.bias",
    "Mixer": "heedful.mixers.mixer",
    "create": "heedful.registry",
    "list_mixers": "heedful.registry",
    "register": "heedful.registry",
}
_ROOMS = (
    "authors",
    "bench",
    "cache",
    "catalogue",
    "hf",
    "inspect",
    "mixers",
    "models",
    "nn",
    "ops",
    "patterns",
    "registry",
    "selection",
    "steer",
    "testing",
)

__all__ = [*_LAZY, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"heedful.{name}")
    raise AttributeError(f"module 'heedful' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if TYPE_CHECKING:  # so that editors and type checkers know the lazy names
    from heedful.mixers.mixer import Mixer
    from heedful.ops.attention import attention, merge_partials
    from heedful.ops.bias import FactoredBias
    from heedful.ops.linear import linear_attention
    from heedful.registry import create, list_mixers, register
