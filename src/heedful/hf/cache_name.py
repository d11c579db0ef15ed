"""What transformers calls a model's cache, as an argument and as an output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

# The second since 5.24, where models still take the first of those who call them.
NAMES = ("past_key_values", "cache")
CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in NAMES)


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among a model's arguments, or None."""
    return next((given[name] for name in NAMES if given.get(name) is not None), None)


def with_cache(given: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """A model's arguments with this cache instead of theirs."""
    return {name: value for name, value in given.items() if name not in NAMES} | {CACHE: cache}
