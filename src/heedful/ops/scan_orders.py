"""Scan orders: the ways in which a map or a video becomes a sequence for a recurrence.

Each takes a map of token numbers and lists it along a route, so that routes compose with views of the map:
columns are rows of `tokens.mT`, a mirrored route is that of `tokens.flip(-1)`, a reversed one is
`order.flip(0)`.
A sequence in the order is `x[..., order]`, and `y[..., inverse_order(order)]` brings it back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from heedful.checks import check_choice, check_positive
from heedful.kept import kept

ROUTES = ("raster", "snake", "diagonal", "spiral")


def token_numbers(size: Sequence[int]) -> Int[Tensor, "*size"]:
    """The row-major number of every token of a map (height, width) or a video (time, height, width).

    Raises ValueError unless all lengths are at least 1.
    """
    for axis, length in enumerate(size):
        check_positive(f"size[{axis}]", length)
    return torch.arange(math.prod(size)).view(*size)


def raster(tokens: Int[Tensor, "*size"]) -> Int[Tensor, " n"]:
    """Row after row, each from its start: the last axis runs fastest."""
    return tokens.flatten()


def snake(tokens: Int[Tensor, "*size"]) -> Int[Tensor, " n"]:
    """Row after row, every second one backwards, so that successive tokens are neighbours on the map.

    With more axes, frame after frame, every second one backwards. Source: PlainMamba, arXiv 2403.17695.
    """
    if tokens.ndim < 2:
        return tokens
    parts = torch.stack([snake(part) for part in tokens.unbind(0)])
    odd = torch.arange(len(parts), device=tokens.device)[:, None] % 2 == 1
    return torch.where(odd, parts.flip(1), parts).flatten()


def diagonal(tokens: Int[Tensor, "height width"]) -> Int[Tensor, " n"]:
    """The diagonals i + j = 0, 1, .. one after another: odd ones downwards, even ones upwards.

    Source: MHS-VM, arXiv 2406.05992.
    """
    height, width = _map(tokens)
    i = torch.arange(height, device=tokens.device)[:, None]
    k = i + torch.arange(width, device=tokens.device)
    key = k * height + torch.where(k % 2 == 1, i, height - 1 - i)
    return tokens.flatten()[key.flatten().argsort()]


def spiral(tokens: Int[Tensor, "height width"]) -> Int[Tensor, " n"]:
    """Clockwise from the first corner inwards. Source: MHS-VM, arXiv 2406.05992."""
    _map(tokens)
    parts = []
    while tokens.numel():
        parts.append(tokens[0])
        tokens = tokens[1:].rot90()  # the right border comes to the top
    return torch.cat(parts)


def tiles(tokens: Int[Tensor, "*size"], size: Sequence[int]) -> Int[Tensor, " n"]:
    """Tile after tile, and row-major in each; tiles at the far borders may be smaller.

    size: lengths of a tile, one an axis. Raises ValueError if they are not. Source: LocalMamba, arXiv
    2403.09338.
    """
    if len(size) != tokens.ndim:
        raise ValueError(f"size is {tuple(size)}, must have one length for each of {tokens.ndim} axes")
    parts = [tokens]
    for axis, length in enumerate(size):
        check_positive(f"size[{axis}]", length)
        parts = [piece for part in parts for piece in part.split(length, dim=axis)]
    return torch.cat([part.flatten() for part in parts])


def strided(tokens: Int[Tensor, "*size"], step: int) -> Int[Tensor, " n"]:
    """The tokens at every step-th place of all axes, row-major, then those one place further, and so on.

    Raises ValueError unless step is at least 1. Source: EfficientVMamba, arXiv 2403.09977.
    """
    check_positive("step", step)
    starts = itertools.product(range(step), repeat=tokens.ndim)
    return torch.cat([tokens[tuple(slice(s, None, step) for s in start)].flatten() for start in starts])


def inverse_order(order: Int[Tensor, "*routes n"]) -> Int[Tensor, "*routes n"]:
    """Where in the order each token stands: `x[order][inverse_order(order)]` is x; route by route."""
    return order.argsort(dim=-1)


def both_ways(*orders: Int[Tensor, " n"]) -> Int[Tensor, "routes n"]:
    """Each order followed by its reverse."""
    return torch.stack([way for order in orders for way in (order, order.flip(0))])


def scan_routes(name: str, size: Sequence[int]) -> Int[Tensor, "4 n"]:
    """Four routes over a map: a base route, its reverse, its counterpart and the reverse of that.

    name  "raster" (rows; columns), the cross scan of VMamba
          "snake" (rows; columns)
          "diagonal" (of the map; of its mirror image, left to right)
          "spiral" (of the map; of its mirror image, top to bottom)
    size  (height, width)

    Raises ValueError if the name is unknown or size is not two lengths of at least 1.
    Source: VMamba, arXiv 2401.10166; MHS-VM, arXiv 2406.05992.
    """
    check_choice("name", name, ROUTES)
    if len(size) != 2:
        raise ValueError(f"size is {tuple(size)}, must be (height, width)")
    # While torch traces, tensors are no real ones and must not be kept.
    routes = _routes.__wrapped__ if torch.compiler.is_compiling() else _routes
    return routes(name, *size).clone()


@kept(64)
def _routes(name: str, height: int, width: int) -> Int[Tensor, "4 n"]:
    tokens = token_numbers((height, width))
    if name == "diagonal":
        return both_ways(diagonal(tokens), diagonal(tokens.flip(1)))
    if name == "spiral":
        return both_ways(spiral(tokens), spiral(tokens.flip(0)))
    along = snake if name == "snake" else raster
    return both_ways(along(tokens), along(tokens.mT))


def _map(tokens: Tensor) -> tuple[int, int]:
    if tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, must be (height, width)")
    return tokens.shape[0], tokens.shape[1]
