"""Sequences without their padding: each row's real tokens stand side by side, from place 0 on.

What counts tokens (groups, blocks, stripes, sinks) must count real ones alone, and rows may have different
numbers of them. All rows share one frame of places, so that one selection serves them; where rows differ,
some places of the frame stay empty, after a row's last token or before its next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from heedful.mixers.state import State


@dataclass(frozen=True)
class PackedState(State):
    """Keys and values of the real tokens (b, h, m, d), by place; count (b): how many of them a row has.

    count is None while every token is real. Places after a row's last token hold zeros.
    """

    key: Float[Tensor, "b h m d"] | None = None
    value: Float[Tensor, "b h m e"] | None = None
    count: Int[Tensor, " b"] | None = None


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a call stand: the frame of places [start, stop), and each token's place.

    place (b, n), -1 for padding; None: start, start + 1, ... in every row.
    before, count (b): real tokens of each row before and after the call; None where place is.
    """

    start: int
    stop: int
    place: Int[Tensor, "b n"] | None = None
    before: Int[Tensor, " b"] | None = None
    count: Int[Tensor, " b"] | None = None

    @classmethod
    def of(
        cls,
        tokens: Shaped[Tensor, "b n"],
        mask: Bool[Tensor, "b n"] | None,
        length: int = 0,
        count: Int[Tensor, " b"] | None = None,
        held: int = 0,
    ) -> Packing:
        """For new tokens (b, n) after `length` others, `count` of them real, that take `held` places."""
        batch, new = tokens.shape
        if mask is None and count is None:
            return cls(length, length + new)
        if count is None:
            count = torch.full((batch,), length, device=tokens.device)
        if mask is None:
            mask = torch.ones(batch, new, dtype=torch.bool, device=tokens.device)
        place = (count[:, None] + mask.long().cumsum(1) - 1).masked_fill(~mask, -1)
        after = count + mask.sum(1)
        if batch == 0:
            return cls(held, held, place, count, after)
        return cls(int(count.min()), max(held, int(after.max())), place, count, after)

    def put(self, x: Shaped[Tensor, "b h n d"]) -> Shaped[Tensor, "b h places d"]:
        """The tokens at their places in the frame; zeros elsewhere."""
        if self.place is None:
            return x
        width = self.stop - self.start
        where = torch.where(self.place >= 0, self.place - self.start, width)[:, None, :, None]
        # Padding goes to one place more, which is cut off.
        frame = x.new_zeros(*x.shape[:2], width + 1, x.shape[3])
        return frame.scatter(2, where.expand(x.shape), x)[:, :, :width]

    def take(self, y: Shaped[Tensor, "b h places d"]) -> Shaped[Tensor, "b h n d"]:
        """From the frame back to the tokens of the call; padding gets zeros."""
        if self.place is None:
            return y
        if self.stop == self.start:
            return y.new_zeros(*y.shape[:2], self.place.shape[1], y.shape[3])
        where = (self.place - self.start).clamp(min=0)[:, None, :, None]
        taken = y.gather(2, where.expand(*y.shape[:2], -1, y.shape[3]))
        return taken.masked_fill(self.place[:, None, :, None] < 0, 0)

    def extend(
        self, old: Shaped[Tensor, "b h m d"] | None, new: Shaped[Tensor, "b h places d"], base: int = 0
    ) -> Shaped[Tensor, "b h total d"]:
        """Places [base, stop): those held so far, which begin at `base`, and those of the frame."""
        if old is None:
            return new
        if self.place is None:
            return torch.cat([old, new], dim=2)
        # A place that one of the two fills is zero in the other.
        missing = self.stop - base - old.shape[2]
        return F.pad(old, (0, 0, 0, missing)) + F.pad(new, (0, 0, self.start - base, 0))
