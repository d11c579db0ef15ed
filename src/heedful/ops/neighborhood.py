"""Neighborhood attention with its weights in the hand, for mechanisms that use them more than once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

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

    size, window and dilation: two values each, along the height and the width.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)

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
        return torch.einsum("bhnd,bhnkd->bhnk", query, self._gathered(key))

    def average(
        self, weights: Float[Tensor, "b h n k"], value: Float[Tensor, "b h n d"]
    ) -> Float[Tensor, "b h n d"]:
        """sum_j w_ij v_j over the neighborhood of i."""
        return torch.einsum("bhnk,bhnkd->bhnd", weights, self._gathered(value))

    def _gathered(self, x: Tensor) -> Tensor:
        return x[:, :, self.index().to(x.device)]

    def _axes(self) -> Sequence[tuple[Tensor, Tensor]]:
        return [neighbors(*each) for each in zip(self.size, self.window, self.dilation, strict=True)]


def _pairs(rows: Int[Tensor, "height kh"], columns: Int[Tensor, "width kw"]) -> Int[Tensor, "n k"]:
    return (rows[:, None, :, None] + columns[None, :, None]).flatten(2).flatten(0, 1)
