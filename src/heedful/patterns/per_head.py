"""A pattern of its own for every head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.patterns.pattern import Pattern


@dataclass(frozen=True)
class PerHead(Pattern):
    """Head i sees what `members[i]` lets it see.

    ValueError if there is no member, if a member distinguishes heads itself, or if members are for
    different numbers of batch rows.
    """

    members: Sequence[Pattern]

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        if not self.members:
            raise ValueError("members is empty, must hold one pattern a head")
        for member in self.members:
            if member.heads != 1:
                raise ValueError(
                    f"members holds {member}, which is for {member.heads} heads, must be for one"
                )
        if len({member.batch for member in self.members} - {1}) > 1:
            rows = [member.batch for member in self.members]
            raise ValueError(f"members are for {rows} batch rows, must agree or be for one")

    @property
    def exact_tiles(self) -> bool:  # type: ignore[override]
        return all(member.exact_tiles for member in self.members)

    @property
    def grain(self) -> int:
        return max(member.grain for member in self.members)

    @property
    def batch(self) -> int:
        return max(member.batch for member in self.members)

    @property
    def heads(self) -> int:
        return len(self.members)

    def check(self, n: int, m: int, query_offset: int) -> None:
        for member in self.members:
            member.check(n, m, query_offset)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # Each different pattern is evaluated once, for all heads that have it.
        heads: dict[Pattern, list[int]] = {}
        for head, member in enumerate(self.members):
            heads.setdefault(member, []).append(head)
        if len(self.members) == 1:
            return self.members[0].visible(b, h, q, k)
        seen = torch.zeros_like(h, dtype=torch.bool)
        for member, own in heads.items():
            here = torch.zeros_like(h, dtype=torch.bool)
            for head in own:
                here = here | (h == head)
            seen = seen | (here & member.visible(b, h, q, k))
        return seen

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.batch, 1, q_lo.shape[0], k_lo.shape[1])
        found = [member.tiles(q_lo, q_hi, k_lo, k_hi) for member in self.members]
        some, every = (torch.cat([t.expand(shape) for t in side], dim=1) for side in zip(*found, strict=True))
        return some, every

    def __str__(self) -> str:
        return f"PerHead({', '.join(map(str, self.members))})"
