"""Neighborhood attention with its weights in the hand, for mechanisms that use them more than once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from heedful.kept import kept
from heedful.ops.counting import counting
from heedful.patterns.neighborhood import Neighborhood


def neighbors(
    length: int, window: int, dilation: int = 1
) -> tuple[Int[Tensor, "n window"], Int[Tensor, "n window"]]:
    """The window of every place of an axis, and how many steps of dilation each of its keys is away.

    Windows move inward at the ends and keep their size, as in `heedful.patterns.Neighborhood`. ValueError
    unless window * dilation is at most the length.
    """
    axis = Neighborhood(length, window, 1, dilation).axes[0]
    places = torch.arange(length)
    index = axis.bounds(places)[0][:, None] + dilation * torch.arange(window)
    return index, (index - places[:, None]) // dilation


@dataclass(frozen=True)
class NeighborhoodMap:
    """The neighborhoods of a map: weights are (b, h, n, k), k keys of a token, row by row of its window.

    size, window and dilation: two values each, along the height and the width. ValueError unless window *
    dilation is at most the size.

    Computed in tiles of tokens whose windows overlap: gathering the k keys of every token by itself would
    move k times the map. While multiply-adds are counted, as in the formulas.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        Neighborhood(self.size, self.window, 1, self.dilation)  # raises ValueError on windows that do not fit

    def index(self) -> Int[Tensor, "n k"]:
        """The row-major numbers of the keys of every token."""
        (rows, _), (columns, _) = self._axes()
        return _pairs(rows * self.size[1], columns)

    def bias(self, table: Float[Tensor, "h rows columns"]) -> Float[Tensor, "h n k"]:
        """Entries of a table by relative place: its middle is for the token itself."""
        (_, rows), (_, columns) = self._axes()
        height, width = table.shape[1:]
        place = _pairs((rows + height // 2) * width, columns + width // 2)
        return table.flatten(1)[:, place.to(table.device)]

    def logits(
        self, query: Float[Tensor, "b h n d"], key: Float[Tensor, "b h n d"]
    ) -> Float[Tensor, "b h n k"]:
        """q_i . k_j for the keys j in the neighborhood of i."""
        if counting():
            return torch.einsum("bhnd,bhnkd->bhnk", query, key[:, :, self.index().to(key.device)])
        tiles = self._tiles(query.device)
        all_pairs = tiles.queries(query, self.size) @ tiles.keys(key, self.size).mT
        return tiles.in_order(all_pairs.gather(-1, tiles.local.expand(*all_pairs.shape[:2], -1, -1, -1, -1)))

    def average(
        self, weights: Float[Tensor, "b h n k"], value: Float[Tensor, "b h n d"]
    ) -> Float[Tensor, "b h n d"]:
        """sum_j w_ij v_j over the neighborhood of i."""
        if counting():
            return torch.einsum("bhnk,bhnkd->bhnd", weights, value[:, :, self.index().to(value.device)])
        tiles = self._tiles(value.device)
        values, weights = tiles.keys(value, self.size), tiles.queries(weights, self.size)
        all_pairs = weights.new_zeros(*weights.shape[:-1], values.shape[-2])
        all_pairs = all_pairs.scatter(-1, tiles.local.expand(*weights.shape[:2], -1, -1, -1, -1), weights)
        return tiles.in_order(all_pairs @ values)

    def _axes(self) -> list[tuple[Tensor, Tensor]]:
        return [neighbors(*each) for each in zip(self.size, self.window, self.dilation, strict=True)]

    def _tiles(self, device: torch.device) -> _Tiles:
        make = _tiles.__wrapped__ if torch.compiler.is_compiling() else _tiles
        return make(self, device)


class _Tiles(NamedTuple):
    """Tiles of t x t' queries, each with the u x u' keys that some query of the tile sees.

    rows, columns  of an axis: places (g, t) of the queries, keys (g, u), and the slot of every place
    local          (g, g', t t', k): which of its tile's keys a query sees. Tiles that are not full repeat
                   their last query and key
    """

    rows: tuple[Tensor, Tensor, Tensor]
    columns: tuple[Tensor, Tensor, Tensor]
    local: Tensor

    def queries(self, x: Tensor, size: tuple[int, int]) -> Float[Tensor, "b h g g2 t d"]:
        return self._taken(x, size, self.rows[0], self.columns[0])

    def keys(self, x: Tensor, size: tuple[int, int]) -> Float[Tensor, "b h g g2 u d"]:
        return self._taken(x, size, self.rows[1], self.columns[1])

    def in_order(self, x: Float[Tensor, "b h g g2 t d"]) -> Float[Tensor, "b h n d"]:
        y = rearrange(x, "b h g r (t s) d -> b h (g t) (r s) d", t=self.rows[0].shape[1])
        return y.index_select(2, self.rows[2]).index_select(3, self.columns[2]).flatten(2, 3)

    def _taken(self, x: Tensor, size: tuple[int, int], rows: Tensor, columns: Tensor) -> Tensor:
        y = x.unflatten(2, size).index_select(2, rows.flatten()).index_select(3, columns.flatten())
        return rearrange(y, "b h (g t) (r s) d -> b h g r (t s) d", g=len(rows), r=len(columns))


@kept(64)
def _tiles(near: NeighborhoodMap, device: torch.device) -> _Tiles:
    axes = [_axis(*each) for each in zip(near.size, near.window, near.dilation, strict=True)]
    (*rows, down), (*columns, across) = [[torch.tensor(x, device=device) for x in axis] for axis in axes]
    local = down[:, None, :, None, :, None] * columns[1].shape[1] + across[None, :, None, :, None, :]
    return _Tiles((*rows,), (*columns,), local.flatten(4).flatten(2, 3))  # type: ignore[arg-type]


def _axis(length: int, window: int, dilation: int) -> tuple[list[Any], ...]:
    """Places (g, t), keys (g, u) and the slots of all places of an axis; which of its keys a place sees.

    In whole numbers of Python, so that sizes are known when a graph is exported.
    """
    places: list[list[int]] = []
    keys: list[list[int]] = []
    local: list[list[list[int]]] = []
    slot = [0] * length
    for residue in range(dilation):  # places a dilation apart share their keys
        group = range(residue, length, dilation)
        starts = [min(max(a - window // 2, 0), len(group) - window) for a in range(len(group))]
        for first in range(0, len(group), window + 1):
            tile = range(first, min(first + window + 1, len(group)))
            for number, a in enumerate(tile):
                slot[group[a]] = len(places) * (window + 1) + number
            seen = range(starts[tile[0]], starts[tile[-1]] + window)
            places.append([group[a] for a in tile])
            keys.append([group[b] for b in seen])
            local.append([[starts[a] + j - seen[0] for j in range(window)] for a in tile])
    most = max(len(tile) for tile in places)
    slot = [s // (window + 1) * most + s % (window + 1) for s in slot]
    return _even(places), _even(keys), slot, _even(local)


def _even(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows made equally long by repeating their last entry."""
    most = max(len(row) for row in rows)
    return [row + row[-1:] * (most - len(row)) for row in rows]


def _pairs(rows: Int[Tensor, "height kh"], columns: Int[Tensor, "width kw"]) -> Int[Tensor, "n k"]:
    return (rows[:, None, :, None] + columns[None, :, None]).flatten(2).flatten(0, 1)
