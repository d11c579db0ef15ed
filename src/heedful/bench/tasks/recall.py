"""Multi-query associative recall: the standard probe that separates sequence mixers.

A sequence first shows `pairs` different keys, each followed by its value. In the rest, keys come back
in random order among blanks, and at each of them the network must say the key's value:

    k3 v7  k1 v2  k8 v5  _ _ k8 _ k3 _ _ _ k1 ...
    targets:                 v5   v7       v2

Design: multi-query associative recall of Zoology (arXiv 2312.04927); every key is asked for at least once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from heedful.bench.tasks.task import ACCURACY, IGNORE, Measure

BLANK = 0


@dataclass(frozen=True)
class Recall:
    """Token 0 is the blank, tokens 1..keys are keys, the `values` tokens after them are values."""

    name: ClassVar[str] = "recall"
    unit: ClassVar[str] = "tokens"
    measure: ClassVar[Measure] = ACCURACY

    length: int = 128
    pairs: int = 8
    queries: int = 64
    keys: int = 16
    values: int = 16
    batch_size: int = 16
    held_out_batches: int = 16
    goal: float = 0.9

    def __post_init__(self) -> None:
        if not self.pairs <= self.keys:
            raise ValueError(f"pairs is {self.pairs}, must be at most keys, which is {self.keys}")
        if not self.pairs <= self.queries <= self.length - 2 * self.pairs:
            raise ValueError(
                f"queries is {self.queries}, must lie between pairs ({self.pairs}) "
                f"and length - 2 pairs ({self.length - 2 * self.pairs})"
            )

    @property
    def vocabulary(self) -> int:
        return 1 + self.keys + self.values

    @property
    def classes(self) -> int:
        return self.vocabulary

    @property
    def units(self) -> int:
        return self.batch_size * self.length

    @property
    def tokens(self) -> int:
        return self.units

    @property
    def about(self) -> str:
        return (
            f"{self.pairs} key-value pairs, then {self.queries} questions in {self.length} tokens; "
            f"chance is {1 / self.values:.3f}"
        )

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        b, p, q = self.batch_size, self.pairs, self.queries
        rows = torch.arange(b)[:, None]
        keys = _choose(b, self.keys, p, generator) + 1
        values = torch.randint(self.values, (b, p), generator=generator) + 1 + self.keys
        again = torch.randint(p, (b, q - p), generator=generator)
        asked = torch.cat([torch.arange(p).expand(b, p), again], dim=1)
        where = _choose(b, self.length - 2 * p, q, generator) + 2 * p  # in random order, so is `asked`

        inputs = torch.full((b, self.length), BLANK)
        inputs[:, 0 : 2 * p : 2] = keys
        inputs[:, 1 : 2 * p : 2] = values
        inputs[rows, where] = keys[rows, asked]
        targets = torch.full((b, self.length), IGNORE)
        targets[rows, where] = values[rows, asked]
        return inputs, targets

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(987654321)  # training seeds are small numbers
        for _ in range(self.held_out_batches):
            yield self.batch(generator)


def _choose(rows: int, among: int, count: int, generator: torch.Generator) -> Tensor:
    """For each row, `count` different numbers below `among`, in random order."""
    return torch.rand(rows, among, generator=generator).argsort(dim=1)[:, :count]
