"""Every stride-th token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.pattern import Pattern
from heedful.patterns.separable import residue_tiles, runs
from heedful.selection import TokenGroups

_TILE = 1024  # queries of a group; whole residues would make groups of any size


@dataclass(frozen=True)
class Strided(Pattern):
    """A query sees the keys with q = k modulo stride (join with `Causal()` for a decoder)."""

    stride: int
    relative = True
    exact_tiles = True

    def __post_init__(self) -> None:
        check_positive("stride", self.stride)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k - q) % self.stride == 0

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        least, most = k_lo - q_hi, k_hi - q_lo
        some = most // self.stride * self.stride >= least
        return some, some if self.stride == 1 else some & (least == most)

    def groups(self, n: int, m: int, query_offset: int, device: torch.device) -> TokenGroups | None:
        if self.stride == 1 or n == 0 or m == 0:
            return None
        first, last = residue_tiles(n, self.stride, _TILE)
        key_first = (first + query_offset) % self.stride
        seen = key_first < m
        queries = runs(first[seen], last[seen], self.stride)
        keys = runs(key_first[seen], torch.full_like(key_first[seen], m - 1), self.stride)
        return TokenGroups(queries[None, None].to(device), keys[None, None].to(device), (n, m))

    def __str__(self) -> str:
        return f"Strided({self.stride})"
