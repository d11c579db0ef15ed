"""KV-cache policies for Hugging Face models: `model.generate(ids, past_key_values=cache)`.

cache = heedful.cache.create("streaming-llm", model, budget=1024)
cache = heedful.cache.StreamingCache(model, sinks=4, window=1020)
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from heedful.registry import Entry, index
from heedful.torchvision_shim import mend_torchvision

mend_torchvision()

_LAZY = {
    "DHSAPrefillCache": "heedful.cache.dhsa_prefill",
    "LayerReuseCache": "heedful.cache.hylra",
    "PolicyCache": "heedful.cache.layer",
    "PolicyLayer": "heedful.cache.layer",
    "RecycledCache": "heedful.cache.recycled",
    "SnapKVCache": "heedful.cache.snapkv",
    "SnapKVStreamingCache": "heedful.cache.snapkv_streaming",
    "StreamingCache": "heedful.cache.streaming",
    "StreamingVLMCache": "heedful.cache.streaming_vlm",
    "cut_stream": "heedful.cache.streaming_vlm",
    "layer_overlap": "heedful.cache.reuse_plan",
    "layer_sensitivity": "heedful.cache.reuse_plan",
    "mrope_positions": "heedful.cache.mrope",
    "plan_layer_reuse": "heedful.cache.reuse_plan",
}

__all__ = [*_LAZY, "create", "names"]


def names() -> list[str]:
    """The names that `create` takes: those of the policies and of their papers."""
    return sorted(_policies())


def create(name: str, model: Any, *, budget: int, **arguments: Any) -> Any:
    """A cache by the name of its policy or paper, that holds about `budget` tokens a layer.

    arguments  of the policy's own constructor, beside those that the budget settles
    Raises ValueError if the name is unknown (with the nearest names) or the budget too small for the policy.
    """
    known = _policies()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)
        raise ValueError(f"no cache policy is called {name!r}; did you mean {', '.join(map(repr, near))}?")
    return known[name].load().of_budget(model, budget, **arguments)


def _policies() -> dict[str, Entry]:
    # streaming-vlm is cut by its user, between rounds
    found = {e.name: e for e in index().values() if e.kind == "cache" and e.name != "streaming-vlm"}
    return {e.paper: e for e in found.values() if e.paper is not None} | found


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'heedful.cache' has no attribute {name!r}")
