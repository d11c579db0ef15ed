"""Looking at the attention calls that a module makes, without touching the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.ops.call import Call
from heedful.patterns.pattern import Pattern


@dataclass(frozen=True)
class Visit:
    """One call: its sizes, and the share of its n x m matrix that lies in what the selection names."""

    batch: int
    heads: int
    n: int
    m: int
    width: int
    visited: float

    @property
    def products(self) -> float:
        """Multiply-adds of the two products over the visited pairs (width: the mean of d and e)."""
        return 2.0 * self.batch * self.heads * self.n * self.m * self.width * self.visited


_observer: ContextVar[list[Visit] | None] = ContextVar("attention calls", default=None)


@contextmanager
def observe() -> Iterator[list[Visit]]:
    """Collect a `Visit` for every `heedful.attention` call inside the context."""
    visits: list[Visit] = []
    token = _observer.set(visits)
    try:
        yield visits
    finally:
        _observer.reset(token)


_watcher: ContextVar[Callable[[Call], None] | None] = ContextVar("watcher of attention calls", default=None)


@contextmanager
def watch(see: Callable[[Call], None]) -> Iterator[None]:
    """Show every `heedful.attention` call inside the context to `see`, before it is computed."""
    token = _watcher.set(see)
    try:
        yield
    finally:
        _watcher.reset(token)


_changer: ContextVar[Callable[[Call, Tensor], Tensor] | None] = ContextVar(
    "changer of attention outputs", default=None
)


@contextmanager
def change(output: Callable[[Call, Tensor], Tensor]) -> Iterator[None]:
    """Put `output(call, out)` in place of what every `heedful.attention` call inside the context gives."""
    token = _changer.set(output)
    try:
        yield
    finally:
        _changer.reset(token)


def changed(call: Call, out: Tensor) -> Tensor:
    """What a changer, where there is one, makes of an output."""
    if torch.compiler.is_compiling():
        return out
    output = _changer.get()
    return out if output is None else output(call, out)


def note(call: Call) -> None:
    """Tell the observer and the watcher, where there are any, of a call."""
    if torch.compiler.is_compiling():  # a context variable would break the graph
        return
    see = _watcher.get()
    if see is not None:
        see(call)
    visits = _observer.get()
    if visits is None:
        return
    width = (call.query.shape[-1] + call.value.shape[-1]) // 2
    visits.append(Visit(call.query.shape[0], call.heads, call.n, call.m, width, _visited(call)))


def _visited(call: Call) -> float:
    selection = call.selection
    if selection is None or call.n * call.m == 0:
        return 1.0
    if isinstance(selection, Pattern):
        groups = selection.groups(call.n, call.m, call.query_offset, torch.device("cpu"))
        if groups is not None:
            return groups.visited()
        return selection.block_table(call.n, call.m, query_offset=call.query_offset).visited()
    return selection.visited()
