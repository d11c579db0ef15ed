"""Local blocks and every stride-th block, on other blocks in every head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.pattern import Pattern
from heedful.registry import register


@register("local-stride", kind="pattern", paper="s2-attention", tags=("sparse", "causal", "blocks", "heads"))
@dataclass(frozen=True)
class LocalStride(Pattern):
    """A query sees the last blocks and, of the blocks before them, the shard of its head.

    In blocks of `block_size` tokens, i of the query and j of the key, for KV head g, visible iff k <= q and
      i - j < local_blocks, or
      (j + g step + offset) mod stride = 0.
    Blocks are counted from the beginning of the sequence, so a key block that a head skips beyond its
    local blocks is never seen again. With step 1 any `stride` heads in a row see all blocks together.

    kv_heads      heads with a shard of their own; 1: the same shard in all heads
    group         query heads that share a KV head and its shard
    local_blocks  its own block counted
    stride        1: everything before is visible
    step          None: stride // (kv_heads * group), at least 1
    dense_heads   so many KV heads, the last ones, see everything before

    ValueError where numbers do not fit.
    Source: S2-Attention, arXiv 2407.17678.
    """

    example: ClassVar[dict[str, Any]] = {"kv_heads": 2, "block_size": 2, "local_blocks": 2, "stride": 2}

    kv_heads: int
    group: int = 1
    block_size: int = 64
    local_blocks: int = 16
    stride: int = 8
    step: int | None = None
    offset: int = 0
    dense_heads: int = 0
    exact_tiles = True

    def __post_init__(self) -> None:
        for name in ("kv_heads", "group", "block_size", "local_blocks", "stride"):
            check_positive(name, getattr(self, name))
        if self.step is None:
            object.__setattr__(self, "step", max(1, self.stride // self.heads))
        if not 0 <= self.dense_heads <= self.kv_heads:
            raise ValueError(
                f"dense_heads is {self.dense_heads}, must lie between 0 and kv_heads, "
                f"which is {self.kv_heads}"
            )

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def shard(self, h: Int[Tensor, "..."], j: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether block j is of the shard of query head h."""
        assert self.step is not None
        g = h // self.group
        own = (j + g * self.step + self.offset) % self.stride == 0
        return own | (g >= self.kv_heads - self.dense_heads) if self.dense_heads else own

    @property
    def grain(self) -> int:
        return self.block_size

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        j = k // self.block_size
        return (k <= q) & ((q // self.block_size - j < self.local_blocks) | self.shard(h, j))

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        assert self.step is not None
        i_lo, i_hi, j_lo, j_hi = (x // self.block_size for x in (q_lo, q_hi, k_lo, k_hi))
        h = torch.arange(self.heads, device=q_lo.device).view(1, -1, 1, 1)
        g = h // self.group
        dense = g >= self.kv_heads - self.dense_heads
        # The first block of the shard that the tile could hold, and its first key.
        to_shard = (-(j_lo + g * self.step + self.offset)) % self.stride
        first = torch.where(dense, j_lo, j_lo + to_shard)
        key = (first * self.block_size).maximum(k_lo)
        some = ((k_lo <= q_hi) & (i_lo - j_hi < self.local_blocks)) | ((first <= j_hi) & (key <= q_hi))

        last = j_hi.minimum(i_hi - self.local_blocks)  # the last block that some query does not have near
        own = dense | (self.stride == 1) | ((j_lo == last) & self.shard(h, j_lo))
        every = (k_hi <= q_lo) & ((last < j_lo) | own)
        return some, every

    def __str__(self) -> str:
        return (
            f"LocalStride({self.heads} heads, block_size={self.block_size}, "
            f"local_blocks={self.local_blocks}, stride={self.stride})"
        )


@register("relative-stride", kind="pattern", paper="s2-attention", tags=("sparse", "blocks"))
@dataclass(frozen=True)
class RelativeStride(Pattern):
    """Local blocks on both sides and every stride-th block beyond them, counted from the query.

    In blocks of `block_size` tokens, d = i - j from the key's block to the query's, visible iff
      (max(d - before + 1, 0) + max(-d - after + 1, 0)) mod stride = 0.

    local_blocks: (before, after), or one number for both; its own block counted in each. The same for all
    heads. Join with `Causal()` for a decoder. ValueError unless all numbers are at least 1.
    Source: the bidirectional form of S2-Attention, arXiv 2407.17678.
    """

    example: ClassVar[dict[str, Any]] = {"block_size": 2, "local_blocks": 2, "stride": 3}

    block_size: int = 64
    local_blocks: int | Sequence[int] = 16
    stride: int = 8
    exact_tiles = True

    def __post_init__(self) -> None:
        given = self.local_blocks
        sides = tuple(given) if isinstance(given, Sequence) else (given, given)
        if len(sides) != 2:
            raise ValueError(f"local_blocks is {given}, must be one number or two, before and after")
        for name, value in (("block_size", self.block_size), ("stride", self.stride)):
            check_positive(name, value)
        for side in sides:
            check_positive("local_blocks", side)
        object.__setattr__(self, "local_blocks", sides)

    @property
    def grain(self) -> int:
        return self.block_size

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        before, after = self._sides()
        d = q // self.block_size - k // self.block_size
        return ((d - before + 1).clamp(min=0) + (-d - after + 1).clamp(min=0)) % self.stride == 0

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        i_lo, i_hi, j_lo, j_hi = (x // self.block_size for x in (q_lo, q_hi, k_lo, k_hi))
        least, most = i_lo - j_hi, i_hi - j_lo  # every d between them occurs
        before, after = self._sides()
        some = (least < before) & (most > -after)
        every = torch.ones_like(some)
        for lo, hi, local in ((least, most, before), (-most, -least, after)):
            lo = lo.clamp(min=local)
            to_stride = (-(lo - local + 1)) % self.stride
            some = some | (lo + to_stride <= hi)
            every = every & ((lo > hi) | (self.stride == 1) | ((lo == hi) & (to_stride == 0)))
        return some, every

    def _sides(self) -> tuple[int, int]:
        assert isinstance(self.local_blocks, tuple)
        return self.local_blocks

    def __str__(self) -> str:
        return f"RelativeStride({self.block_size}, {self.local_blocks}, {self.stride})"
