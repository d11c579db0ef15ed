"""Patterns on grids of tokens that are visible iff they are visible on every axis.

Grids are flattened row-major: the last axis runs fastest.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from heedful.checks import check_positive
from heedful.kept import kept
from heedful.patterns.pattern import Pattern
from heedful.selection import TokenGroups
from heedful.selection.block_table import MaskFn

T = TypeVar("T", int, bool)


def per_axis(name: str, value: T | Sequence[T], axes: int) -> tuple[T, ...]:
    """One value an axis from one value for all; ValueError if a sequence has another length."""
    if not isinstance(value, Sequence):
        return (value,) * axes
    if len(value) != axes:
        raise ValueError(f"{name} is {tuple(value)}, must be one value or {axes}, one an axis of the grid")
    return tuple(value)


def grid_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """The lengths of the axes of a grid; ValueError unless each is at least 1."""
    lengths = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if not lengths:
        raise ValueError("shape is (), must have at least one axis")
    for length in lengths:
        check_positive("shape", length)
    return lengths


def brief(value: int | Sequence[int]) -> str:
    """`5x3` for (5, 3)."""
    return "x".join(map(str, value)) if isinstance(value, Sequence) else str(value)


@dataclass(frozen=True)
class Axis:
    """One axis: the query at q sees the keys first(q) <= k <= last(q) with (k - q) a multiple of `step`.

    bounds   q -> (first, last), elementwise; on the queries of one residue modulo step both never
             decrease and neighbouring ranges touch, so that a run of queries sees one range of keys
    tile     how many queries of a residue go into one group; tiles begin at -phase
    whole    whether every query sees the whole axis
    """

    size: int
    bounds: Callable[[Tensor], tuple[Tensor, Tensor]]
    tile: int
    step: int = 1
    phase: int = 0
    whole: bool = False

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        first, last = self.bounds(q)
        seen = (k >= first) & (k <= last)
        return seen if self.step == 1 else seen & ((k - q) % self.step == 0)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        """(some, every), both exact, for intervals of coordinates that are not empty."""
        every = (k_lo >= self.bounds(q_hi)[0]) & (k_hi <= self.bounds(q_lo)[1])
        if self.step > 1:
            # Two neighbouring queries, or keys, are never of one residue.
            every = every & (q_lo == q_hi) & (k_lo == k_hi) & ((k_lo - q_lo) % self.step == 0)
        some = torch.zeros_like(every)
        for residue in range(self.step):
            q_first, k_first = (x + (residue - x) % self.step for x in (q_lo, k_lo))
            q_last, k_last = (x - (x - residue) % self.step for x in (q_hi, k_hi))
            meet = (k_first <= self.bounds(q_last)[1]) & (k_last >= self.bounds(q_first)[0])
            some = some | (meet & (q_first <= q_last) & (k_first <= k_last))
        return some, every

    def groups(self) -> tuple[Tensor, Tensor, bool]:
        """Groups of queries (g, lq) and their keys (g, lk), -1 pads; whether all pairs are visible."""
        starts = [
            (residue + self.step * max(0, a), residue + self.step * min(a + self.tile, count) - self.step)
            for residue in range(min(self.step, self.size))
            for count in [-(-(self.size - residue) // self.step)]
            for a in range(-self.phase, count, self.tile)
            if a + self.tile > 0
        ]
        q_first, q_last = torch.tensor(starts).unbind(1)
        (k_first, k_end), (k_start, k_last) = self.bounds(q_first), self.bounds(q_last)
        common = torch.equal(k_first, k_start) and torch.equal(k_end, k_last)
        k_first = k_first + (q_first - k_first) % self.step  # the first key of the residue
        return runs(q_first, q_last, self.step), runs(k_first, k_last, self.step), common


def runs(first: Int[Tensor, " g"], last: Int[Tensor, " g"], step: int) -> Int[Tensor, "g most"]:
    """The rows first, first + step, ... up to last, padded with -1."""
    most = max(0, int((last - first).max()) // step + 1) if len(first) else 0
    index = first[:, None] + step * torch.arange(most)
    return index.masked_fill(index > last[:, None], -1)


def outer(parts: Sequence[Int[Tensor, "_ _"]], shape: Sequence[int]) -> Int[Tensor, "_ _"]:
    """Row-major positions of all combinations of the groups of each axis; -1 pads."""
    index = torch.zeros(1, 1, dtype=torch.int64)
    for part, size in zip(parts, shape, strict=True):
        left, right = index[:, None, :, None], part[None, :, None, :]
        joined = torch.where((left < 0) | (right < 0), -1, left * size + right)
        index = joined.flatten(2).flatten(0, 1)
    return index


def even_tile(length: int, target: int, multiple: int = 1) -> int:
    """About `target`, a multiple of `multiple`, such that the tiles of `length` are alike."""
    units = -(-length // multiple)
    tiles = -(-units // max(1, target // multiple))
    return -(-units // tiles) * multiple


def residue_tiles(n: int, step: int, target: int) -> tuple[Int[Tensor, " g"], Int[Tensor, " g"]]:
    """First and last rows of runs `step` apart that together hold rows 0 to n - 1, about `target` each."""
    tile = step * even_tile(-(-n // step), target)
    first = torch.cat([torch.arange(start, min(start + step, n)) for start in range(0, n, tile)])
    end = (first - first % tile + tile - 1).clamp(max=n - 1)
    return first, end - (end - first) % step


class Separable(Pattern):
    """A pattern on a grid: visible iff visible on every axis."""

    shape: int | Sequence[int]
    exact_tiles = True

    @property
    @abstractmethod
    def axes(self) -> tuple[Axis, ...]:
        """What each axis sees."""

    @property
    def gathers(self) -> bool:
        """Whether groups are cheaper than a block table."""
        return True

    def check(self, n: int, m: int, query_offset: int) -> None:
        tokens = math.prod(grid_shape(self.shape))
        if m != tokens:
            raise ValueError(f"{self} is for {tokens} keys, was given {m}")
        if query_offset < 0 or query_offset + n > m:
            raise ValueError(
                f"{self} has positions 0 to {m - 1}, was given queries at positions "
                f"{query_offset} to {query_offset + n - 1}"
            )

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen: Tensor | None = None
        for i, axis in reversed(list(enumerate(self.axes))):
            if not axis.whole:
                on_axis = axis.visible(q % axis.size, k % axis.size) if i else axis.visible(q, k)
                seen = on_axis if seen is None else seen & on_axis
            q, k = q // axis.size, k // axis.size
        return torch.ones_like(q == k) if seen is None else seen

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        axes = self.axes
        lengths = [axis.size for axis in axes]
        shape = torch.broadcast_shapes(q_lo.shape, k_lo.shape)
        some = torch.zeros(shape, dtype=torch.bool, device=q_lo.device)
        every = torch.ones(shape, dtype=torch.bool, device=q_lo.device)
        for (q_box, q_live), (k_box, k_live) in product(
            _boxes(q_lo, q_hi, lengths), _boxes(k_lo, k_hi, lengths)
        ):
            live = q_live & k_live
            box_some, box_every = live, torch.ones_like(live)
            for axis, q_side, k_side in zip(axes, q_box, k_box, strict=True):
                axis_some, axis_every = axis.tiles(*q_side, *k_side)
                box_some, box_every = box_some & axis_some, box_every & axis_every
            some, every = some | box_some, every & (box_every | ~live)
        return some, every

    def groups(self, n: int, m: int, query_offset: int, device: torch.device) -> TokenGroups | None:
        if n != m or query_offset != 0 or not self.gathers:
            return None
        return _groups(self, torch.device(device))


def _boxes(lo: Tensor, hi: Tensor, shape: Sequence[int]) -> list[tuple[list[tuple[Tensor, Tensor]], Tensor]]:
    """The row-major interval [lo, hi] as boxes: (bounds on each axis, whether there is such a box)."""
    weights = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    low = [lo // w % s for w, s in zip(weights, shape, strict=True)]
    high = [hi // w % s for w, s in zip(weights, shape, strict=True)]
    boxes = []
    for axis, size in enumerate(shape):
        inner = 0 if axis == len(shape) - 1 else 1  # rows cut by the ends belong to the boxes further in
        together = lo // (weights[axis] * size) == hi // (weights[axis] * size)
        rest = [(torch.zeros_like(lo), torch.full_like(lo, s - 1)) for s in shape[axis + 1 :]]
        end = torch.where(together, high[axis] - inner, size - 1)
        head = [*((x, x) for x in low[:axis]), (low[axis] + inner, end), *rest]
        boxes.append((head, low[axis] + inner <= end))
        if axis:
            start = torch.zeros_like(lo)
            tail = [*((x, x) for x in high[:axis]), (start, high[axis] - inner), *rest]
            boxes.append((tail, ~together & (start <= high[axis] - inner)))
    return boxes


@kept(16)
def _groups(pattern: Separable, device: torch.device) -> TokenGroups:
    axes = pattern.axes
    shape = [axis.size for axis in axes]
    parts = [axis.groups() for axis in axes]
    query_index = outer([queries for queries, _, _ in parts], shape)[None, None].to(device)
    key_index = outer([keys for _, keys, _ in parts], shape)[None, None].to(device)
    mask_fn: MaskFn | None = None if all(common for _, _, common in parts) else pattern.visible
    tokens = math.prod(shape)
    return TokenGroups(query_index, key_index, (tokens, tokens), mask_fn)
