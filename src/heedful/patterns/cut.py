"""An axis of a grid that is cut into parts: tokens see their own part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Cut:
    """One axis for `Separable`, cut at `borders` into runs; run number modulo `parts` names the part.

    borders  ascending coordinates at which a run begins, at most `parts` of them: the first and the last of
             parts + 1 runs are one part, which wraps around the end of the axis
    """

    size: int
    borders: tuple[int, ...] = ()
    parts: int = 1

    @property
    def whole(self) -> bool:
        """Whether every query sees the whole axis."""
        return self.parts == 1

    def run(self, x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The number of the run at x."""
        number = torch.zeros_like(x)
        for border in self.borders:
            number = number + (x >= border)
        return number

    def visible(self, q: Int[Tensor, "..."], k: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return self.run(q) % self.parts == self.run(k) % self.parts

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        """(some, every), both exact, for intervals of coordinates that are not empty."""
        a, b, c, d = (self.run(x) for x in (q_lo, q_hi, k_lo, k_hi))
        wrapped = ((a == 0) & (d == self.parts)) | ((c == 0) & (b == self.parts))
        every = (a == b) & (c == d) & (a % self.parts == c % self.parts)
        return ((a <= d) & (c <= b)) | wrapped, every

    def groups(self) -> tuple[Int[Tensor, "g lq"], Int[Tensor, "g lk"], bool]:
        """The parts that hold a token, as groups of queries and of keys, -1 pads; all pairs are visible."""
        part = self.run(torch.arange(self.size)) % self.parts
        tokens = [(part == p).nonzero()[:, 0] for p in part.unique().tolist()]
        index = pad_sequence(tokens, batch_first=True, padding_value=-1)
        return index, index, True
