"""Keeping what depends on shapes alone between calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_all: list[Any] = []


def kept(maxsize: int) -> Callable[[Callable[..., Any]], Any]:
    """`functools.lru_cache` for functions that make tensors; `__wrapped__` is the function itself.

    A tensor made in torch.inference_mode cannot be saved for a backward pass. A plan that is first asked for
    there must serve the training that follows, so that it is made outside.
    """

    def wrap(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def outside(*args: Any) -> Any:
            with torch.inference_mode(False):
                return function(*args)

        remembered = functools.lru_cache(maxsize)(outside)
        remembered.__wrapped__ = function  # type: ignore[attr-defined]
        _all.append(remembered)
        return remembered

    return wrap


def forget() -> None:
    """Drop all that is kept, and the memory it takes."""
    for remembered in _all:
        remembered.cache_clear()
