"""What an experiment was to show, and what it showed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """A pattern that a paper states, the figure measured here, and whether it is within its bound."""

    pattern: str
    measured: float
    bound: str  # for the reader: "< 0.1"
    holds: bool

    @classmethod
    def below(cls, pattern: str, measured: float, bound: float) -> Finding:
        return cls(pattern, measured, f"< {bound:g}", measured < bound)

    @classmethod
    def above(cls, pattern: str, measured: float, bound: float) -> Finding:
        return cls(pattern, measured, f"> {bound:g}", measured > bound)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
