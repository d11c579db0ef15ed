"""The list of checks, in the order in which they run: each presumes only what comes before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from heedful.registry import Entry
from heedful.testing.subject import Subject

Prove = Callable[[Subject], None]
CHECKS: dict[str, Check] = {}


@dataclass(frozen=True)
class Check:
    """A check: what it is called, what proves it, and the mixers it is for."""

    name: str
    prove: Prove
    applies: Callable[[Entry], bool]


def check(applies: Callable[[Entry], bool] = lambda entry: True) -> Callable[[Prove], Prove]:
    """Enter a function into the list under its own name; it is for the entries that `applies` accepts."""

    def enter(prove: Prove) -> Prove:
        CHECKS[prove.__name__] = Check(prove.__name__, prove, applies)
        return prove

    return enter


def is_causal(entry: Entry) -> bool:
    return entry.kind == "sequence" and entry.causal != "never"


def decodes(entry: Entry) -> bool:
    return entry.kind == "sequence" and entry.decode


def is_masked(entry: Entry) -> bool:
    return entry.kind in ("sequence", "pool")


def takes_context(entry: Entry) -> bool:
    return entry.cross or entry.kind == "cross"
