"""Whether multiply-adds are being counted: then mechanisms compute as their formulas say, not as is fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_counting: ContextVar[bool] = ContextVar("counting", default=False)


def counting() -> bool:
    """Whether this is a pass that counts."""
    # A context variable would break the graph.
    return not torch.compiler.is_compiling() and _counting.get()


@contextmanager
def counted() -> Iterator[None]:
    """Passes in here are counted: products that only a fast form makes are left out."""
    token = _counting.set(True)
    try:
        yield
    finally:
        _counting.reset(token)
