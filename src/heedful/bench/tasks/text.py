"""Byte language modelling on real English: Python's own documentation, or a file of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from heedful.bench.tasks.task import BITS_PER_BYTE, Measure


@dataclass(frozen=True)
class Text:
    """Windows of `length` bytes; each byte is predicted from those before it in its window.

    The last tenth of the text is held out.
    """

    name: ClassVar[str] = "text"
    unit: ClassVar[str] = "tokens"
    measure: ClassVar[Measure] = BITS_PER_BYTE
    vocabulary: ClassVar[int] = 256

    data: bytes
    source: str
    length: int = 256
    batch_size: int = 8
    held_out_windows: int = 96

    def __post_init__(self) -> None:
        if len(self.data) < 20 * (self.length + 1):
            raise ValueError(
                f"the text {self.source} has {len(self.data)} bytes, must have at least "
                f"{20 * (self.length + 1)} to train on and to hold out windows of {self.length}"
            )

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor]:
        """The bytes for training and the held-out ones."""
        tokens = torch.frombuffer(bytearray(self.data), dtype=torch.uint8).long()
        cut = len(tokens) * 9 // 10
        return tokens[:cut], tokens[cut:]

    @cached_property
    def references(self) -> tuple[float, float]:
        """Bits per held-out byte of smoothed byte and byte-pair counts of the training part."""
        train, held = self.parts
        one = torch.bincount(train, minlength=256).double()
        two = torch.bincount(train[:-1] * 256 + train[1:], minlength=256 * 256).double().view(256, 256)
        order0 = (one + 1) / (one.sum() + 256)
        order1 = (two + 0.1) / (two.sum(1, keepdim=True) + 25.6)
        return -float(order0[held].log2().mean()), -float(order1[held[:-1], held[1:]].log2().mean())

    @property
    def goal(self) -> float:
        return self.references[1] - 0.3  # what pairs of bytes do not tell

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
        order0, order1 = self.references
        return (
            f"{self.source}, {len(self.data) / 1000:.0f} kB in windows of {self.length} bytes; "
            f"counts of bytes give {order0:.2f}, of byte pairs {order1:.2f}"
        )

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = torch.randint(len(self.parts[0]) - self.length, (self.batch_size, 1), generator=generator)
        window = self.parts[0][start + torch.arange(self.length + 1)]
        return window[:, :-1], window[:, 1:]

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        held = self.parts[1]
        fit = (len(held) - 1) // self.length  # windows that do not overlap
        chosen = torch.linspace(0, fit - 1, min(fit, self.held_out_windows)).long()
        for rows in chosen.split(self.batch_size):
            window = held[rows[:, None] * self.length + torch.arange(self.length + 1)]
            yield window[:, :-1], window[:, 1:]


def load(path: Path | None) -> tuple[bytes, str]:
    """The text and its name: a file, or by default the documentation topics that come with Python."""
    if path is not None:
        if not path.is_file():
            raise ValueError(f"{path} is not a file; the task text needs a text file")
        return path.read_bytes(), path.name
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode(), "Python's documentation topics"
