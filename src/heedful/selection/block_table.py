"""`BlockTable`: for every block of queries, the blocks of keys it sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

PARTIAL, FULL = 0, 1

# mask(batch, head, row, column) -> bool, elementwise on integer tensors that broadcast; rows and
# columns count queries and keys from 0. The convention of FlexAttention's mask_mod.
MaskFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Key blocks seen by each query block, broadcast over batch and heads.

    count  (b|1, h|1, query blocks): how many key blocks a query block sees
    index  (b|1, h|1, query blocks, most): their numbers, ascending; entries past `count` mean nothing
    kind   like index: FULL (every pair visible) or PARTIAL (`mask_fn` decides)
    shape  (n, m), the numbers of queries and keys; the last blocks may be cut short
    """

    count: Int[Tensor, "b h nq"]
    index: Int[Tensor, "b h nq most"]
    kind: UInt8[Tensor, "b h nq most"]
    block_size: tuple[int, int]
    shape: tuple[int, int]
    mask_fn: MaskFn | None = None

    def __post_init__(self) -> None:
        blocks = [-(-s // z) for s, z in zip(self.shape, self.block_size, strict=True)]
        fits = self.index.ndim == 4 and self.count.shape == self.index.shape[:3]
        if not fits or self.index.shape != self.kind.shape:
            raise ValueError(
                f"count {tuple(self.count.shape)}, index {tuple(self.index.shape)} and kind "
                f"{tuple(self.kind.shape)} do not fit: index and kind must be count's shape and one axis more"
            )
        if self.count.shape[2] != blocks[0]:
            raise ValueError(f"count has {self.count.shape[2]} query blocks, must have {blocks[0]}")

    @classmethod
    def from_tiles(
        cls,
        some: Bool[Tensor, "b h nq nk"],
        every: Bool[Tensor, "b h nq nk"],
        block_size: tuple[int, int],
        shape: tuple[int, int],
        mask_fn: MaskFn | None = None,
    ) -> BlockTable:
        """From dense tile maps: `some` pair of a tile is visible, `every` pair is."""
        count = some.sum(-1)
        most = int(count.max()) if count.numel() else 0
        # A stable sort of "not seen" puts the seen blocks first, in ascending order.
        index = (~some).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
        kind = (every & some).to(torch.uint8).gather(-1, index)
        return cls(count, index, kind, block_size, shape, mask_fn)

    def visited(self) -> float:
        """Share of the n x m matrix that lies in seen blocks, the mean over batch and heads."""
        n, m = self.shape
        bq, bk = self.block_size
        rows = torch.full((self.count.shape[-1],), bq, device=self.count.device)
        rows[-1] = n - (len(rows) - 1) * bq
        width = (m - self.index * bk).clamp(max=bk)
        live = torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]
        cells = (width * live).sum(-1) * rows
        leading = self.count.shape[0] * self.count.shape[1]
        return float(cells.sum()) / (leading * n * m) if n * m else 0.0

    def dense(self, batch: int = 1, heads: int = 1) -> Bool[Tensor, "b h n m"]:
        """The mask this table stands for (for tests and pictures)."""
        n, m = self.shape
        bq, bk = self.block_size
        device = self.index.device
        b, h = torch.broadcast_shapes((batch, heads), self.count.shape[:2])
        shape = (b, h, *self.index.shape[2:])
        index, kind = self.index.expand(shape), self.kind.expand(shape)
        live = (torch.arange(shape[-1], device=device) < self.count[..., None]).expand(shape)
        tiles = torch.zeros(b, h, shape[2], -(-m // bk), dtype=torch.uint8, device=device)
        # A seen tile gets 1 if partial and 2 if full; entries past count add nothing.
        tiles.scatter_add_(-1, index, live.to(torch.uint8) * (1 + kind))
        cells = tiles.repeat_interleave(bq, 2)[:, :, :n].repeat_interleave(bk, 3)[..., :m]
        if self.mask_fn is None:
            return cells > 0
        ib, ih, row, col = (
            torch.arange(s, device=device).view([-1 if i == a else 1 for i in range(4)])
            for a, s in enumerate((b, h, n, m))
        )
        return (cells == 2) | ((cells == 1) & self.mask_fn(ib, ih, row, col))
