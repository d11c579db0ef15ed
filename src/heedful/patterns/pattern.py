"""The base of all patterns, and the algebra that joins them.

A pattern says which pairs (query position, key position) are visible. `visible` is its definition.
`tiles` classifies whole rectangles of positions without looking at their pairs; that is what makes
block tables without an N x M buffer possible. `groups` is for patterns that fall apart into groups
of queries with common keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from heedful.checks import check_positive
from heedful.kept import kept
from heedful.selection import BlockTable, TokenGroups
from heedful.selection.block_table import MaskFn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CHUNK = 1 << 22  # pairs looked at in one go while block tables are refined


class Pattern(ABC):
    """An immutable description of visible pairs. Subclasses are frozen dataclasses.

    Query row i of a call stands at key position i + query_offset (by default m - n); patterns speak of
    positions, so decoding with a cache needs nothing special.
    """

    relative: ClassVar[bool] = False  # visible depends on key - query alone, for every batch row and head
    exact_tiles: ClassVar[bool] = False  # `tiles` is exact, not only safe

    @property
    def grain(self) -> int:
        """Keys a block where the pattern shows or hides whole blocks of keys, counted from key 0; else 1."""
        return 1

    # -- what a pattern defines -------------------------------------------------------------------

    @abstractmethod
    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Bool[Tensor, "..."]:
        """Whether the query at position q sees the key at position k; elementwise, arguments broadcast."""

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        """(some, every): is any pair, is each pair of [q_lo, q_hi] x [k_lo, k_hi] visible?

        Bounds are positions, inclusive; q_* have shape (nq, 1) and k_* (1, nk); the results broadcast
        to (b, h, nq, nk). `some` may say yes too often and `every` no too often, never the reverse.
        """
        shape = torch.broadcast_shapes(q_lo.shape, k_lo.shape)
        yes = torch.ones(shape, dtype=torch.bool, device=q_lo.device)
        return yes, ~yes

    def groups(self, n: int, m: int, query_offset: int, device: torch.device) -> TokenGroups | None:
        """The same pattern as groups of queries with common keys, where that is cheaper; else None."""
        return None

    def check(self, n: int, m: int, query_offset: int) -> None:  # noqa: B027  most patterns fit anything
        """Raise a ValueError if the pattern does not fit n queries and m keys."""

    @property
    def batch(self) -> int:
        """1, or the number of batch rows the pattern distinguishes."""
        return 1

    @property
    def heads(self) -> int:
        """1, or the number of heads the pattern distinguishes."""
        return 1

    # -- what every pattern gives -----------------------------------------------------------------

    def mask_fn(self, query_offset: int) -> MaskFn:
        """`visible` on rows and columns instead of positions."""
        if query_offset == 0:
            return self.visible
        return lambda b, h, q, k: self.visible(b, h, q + query_offset, k)

    def mask_mod(self, query_offset: int = 0) -> MaskFn:
        """A `mask_mod` for torch.nn.attention.flex_attention."""
        # A plain function: PyTorch counts the `self` of a bound method and takes it for a score_mod.
        return lambda b, h, q, k: self.visible(b, h, q + query_offset, k)

    def mask(
        self,
        n: int,
        m: int | None = None,
        *,
        query_offset: int | None = None,
        device: torch.device | None = None,
    ) -> Bool[Tensor, "b h n m"]:
        """The dense mask, (1 or batch, 1 or heads, n, m), True = visible."""
        m, offset = self._door(n, m, query_offset)
        b, h, q, k = _axes((self.batch, self.heads, n, m), device)
        return self.visible(b, h, q + offset, k).expand(self.batch, self.heads, n, m)

    def block_table(
        self,
        n: int,
        m: int | None = None,
        *,
        block_size: tuple[int, int] = (128, 128),
        query_offset: int | None = None,
        device: torch.device | None = None,
    ) -> BlockTable:
        """Which key blocks each query block sees; no n x m buffer is held."""
        m, offset = self._door(n, m, query_offset)
        for name, size in zip(("block_size[0]", "block_size[1]"), block_size, strict=True):
            check_positive(name, size)
        return _block_table(self, n, m, offset, block_size, torch.device(device or "cpu"))

    def density(self, n: int, m: int | None = None, *, query_offset: int | None = None) -> float:
        """Share of visible pairs, the mean over the batch rows and heads the pattern distinguishes."""
        m, offset = self._door(n, m, query_offset)
        if n * m == 0:
            return 0.0
        step = max(1, _CHUNK // m)
        total = 0
        for start in range(0, n, step):
            rows = min(step, n - start)
            b, h, q, k = _axes((self.batch, self.heads, rows, m), None)
            seen = self.visible(b, h, q + start + offset, k).expand(self.batch, self.heads, rows, m)
            total += int(seen.sum())
        return total / (self.batch * self.heads * n * m)

    def plot(self, n: int, m: int | None = None, *, ax: Axes | None = None) -> Axes:
        """Draw the mask (one panel; head 0 of batch row 0) and return the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(4, 4), layout="constrained")
        ax.imshow(self.mask(n, m)[0, 0], cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        ax.set(xlabel="key position (tokens)", ylabel="query position (tokens)", title=str(self))
        return ax

    def __and__(self, other: Pattern) -> Pattern:
        return And(self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return Or(self, other)

    def __invert__(self) -> Pattern:
        return Not(self)

    def _door(self, n: int, m: int | None, query_offset: int | None) -> tuple[int, int]:
        m = n if m is None else m
        offset = m - n if query_offset is None else query_offset
        self.check(n, m, offset)
        return m, offset


def _axes(shape: tuple[int, int, int, int], device: torch.device | None) -> list[Tensor]:
    return [
        torch.arange(size, device=device).view([-1 if i == axis else 1 for i in range(4)])
        for axis, size in enumerate(shape)
    ]


def _join(kind: str, own: int, other: int) -> int:
    if own != other and 1 not in (own, other):
        raise ValueError(f"patterns for {own} and {other} {kind} do not join; they must agree or be for one")
    return max(own, other)


@dataclass(frozen=True)
class _Pair(Pattern):
    left: Pattern
    right: Pattern

    def __post_init__(self) -> None:
        _join("heads", self.left.heads, self.right.heads)
        _join("batch rows", self.left.batch, self.right.batch)

    @property
    def relative(self) -> bool:  # type: ignore[override]
        return self.left.relative and self.right.relative

    @property
    def grain(self) -> int:
        return max(self.left.grain, self.right.grain)

    @property
    def batch(self) -> int:
        return max(self.left.batch, self.right.batch)

    @property
    def heads(self) -> int:
        return max(self.left.heads, self.right.heads)

    def check(self, n: int, m: int, query_offset: int) -> None:
        self.left.check(n, m, query_offset)
        self.right.check(n, m, query_offset)


@dataclass(frozen=True)
class And(_Pair):
    """Visible in both patterns."""

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.visible(b, h, q, k) & self.right.visible(b, h, q, k)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        some, every = self.left.tiles(q_lo, q_hi, k_lo, k_hi)
        some2, every2 = self.right.tiles(q_lo, q_hi, k_lo, k_hi)
        return some & some2, every & every2

    def groups(self, n: int, m: int, query_offset: int, device: torch.device) -> TokenGroups | None:
        for part in (self.left, self.right):
            found = part.groups(n, m, query_offset, device)
            if found is not None:
                # A mask that distinguishes heads or batch rows needs groups that do.
                index = found.query_index.expand(self.batch, self.heads, -1, -1)
                return TokenGroups(index, found.key_index, found.shape, self.mask_fn(query_offset))
        return None

    def __str__(self) -> str:
        return f"({self.left} & {self.right})"


@dataclass(frozen=True)
class Or(_Pair):
    """Visible in either pattern."""

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.visible(b, h, q, k) | self.right.visible(b, h, q, k)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        some, every = self.left.tiles(q_lo, q_hi, k_lo, k_hi)
        some2, every2 = self.right.tiles(q_lo, q_hi, k_lo, k_hi)
        return some | some2, every | every2

    def __str__(self) -> str:
        return f"({self.left} | {self.right})"


@dataclass(frozen=True)
class Not(Pattern):
    """Visible where the inner pattern is not."""

    inner: Pattern

    @property
    def relative(self) -> bool:  # type: ignore[override]
        return self.inner.relative

    @property
    def grain(self) -> int:
        return self.inner.grain

    @property
    def batch(self) -> int:
        return self.inner.batch

    @property
    def heads(self) -> int:
        return self.inner.heads

    def check(self, n: int, m: int, query_offset: int) -> None:
        self.inner.check(n, m, query_offset)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~self.inner.visible(b, h, q, k)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        some, every = self.inner.tiles(q_lo, q_hi, k_lo, k_hi)
        return ~every, ~some

    def __str__(self) -> str:
        return f"~{self.inner}"


@kept(64)
def _block_table(
    pattern: Pattern, n: int, m: int, offset: int, block_size: tuple[int, int], device: torch.device
) -> BlockTable:
    bq, bk = block_size
    q_lo = torch.arange(0, n, bq)
    q_hi = (q_lo + bq - 1).clamp(max=n - 1)
    k_lo = torch.arange(0, m, bk)
    k_hi = (k_lo + bk - 1).clamp(max=m - 1)
    some, every = pattern.tiles((q_lo + offset)[:, None], (q_hi + offset)[:, None], k_lo[None], k_hi[None])
    shape = (pattern.batch, pattern.heads, len(q_lo), len(k_lo))
    some, every = some.expand(shape).clone(), every.expand(shape).clone()
    every &= some
    if not pattern.exact_tiles:
        _refine(pattern, some, every, n, m, offset, block_size)
    some, every = some.to(device), every.to(device)
    return BlockTable.from_tiles(some, every, block_size, (n, m), pattern.mask_fn(offset))


def _refine(
    pattern: Pattern, some: Tensor, every: Tensor, n: int, m: int, offset: int, block_size: tuple[int, int]
) -> None:
    """Look into the tiles that are neither surely empty nor surely full."""
    bq, bk = block_size
    unsure = (some & ~every).nonzero()
    if pattern.relative and len(unsure):
        # Tiles of one diagonal are alike; cut tiles at the ends are kept apart.
        cut = (unsure[:, 2] == some.shape[2] - 1) * 2 + (unsure[:, 3] == some.shape[3] - 1)
        keys = torch.stack([unsure[:, 2] * bq - unsure[:, 3] * bk, cut.long()], dim=1)
        _, inverse = torch.unique(keys, dim=0, return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(unsure)).scatter_reduce_(
            0, inverse, torch.arange(len(unsure)), "amin"
        )
        seen_some, seen_every = _look(pattern, unsure[first], n, m, offset, block_size)
        seen_some, seen_every = seen_some[inverse], seen_every[inverse]
    else:
        seen_some, seen_every = _look(pattern, unsure, n, m, offset, block_size)
    some[tuple(unsure.T)] = seen_some
    every[tuple(unsure.T)] = seen_every


def _look(
    pattern: Pattern, tiles: Tensor, n: int, m: int, offset: int, block_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    bq, bk = block_size
    some = torch.zeros(len(tiles), dtype=torch.bool)
    every = torch.zeros(len(tiles), dtype=torch.bool)
    step = max(1, _CHUNK // (bq * bk))
    for start in range(0, len(tiles), step):
        b, h, i, j = (t[:, None, None] for t in tiles[start : start + step].unbind(1))
        row = i * bq + torch.arange(bq)[:, None]
        col = j * bk + torch.arange(bk)
        inside = (row < n) & (col < m)
        # Positions past the ends are moved inside, so that patterns with tables can look them up.
        seen = pattern.visible(b, h, row.clamp(max=n - 1) + offset, col.clamp(max=m - 1))
        seen = seen.expand(inside.shape)
        some[start : start + step] = (seen & inside).flatten(1).any(1)
        every[start : start + step] = (seen | ~inside).flatten(1).all(1)
    return some, every
