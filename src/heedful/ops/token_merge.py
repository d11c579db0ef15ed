"""Merging tokens of a map into the ones that they resemble, and copying the results back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from heedful.checks import check_positive


@dataclass(frozen=True, eq=False)
class TokenMatch:
    """Which tokens stay (targets), and for all others the target they resemble, best match first.

    target  numbers of the tokens that stay, row by row, (b, t)
    source  numbers of the others by falling similarity, (b, s)
    chosen  for each of them the place of its target among the targets, (b, s)
    """

    target: Int[Tensor, "b t"]
    source: Int[Tensor, "b s"]
    chosen: Int[Tensor, "b s"]

    def merge(self, x: Float[Tensor, "b n c"], count: int) -> Float[Tensor, "b kept c"]:
        """All sources but the `count` best matches, which go into the means of their targets; the targets."""
        self._check(count)
        merged, kept = self.source[:, :count], self.source[:, count:]
        targets = _take(x, self.target)
        index = self.chosen[:, :count, None].expand(-1, -1, x.shape[-1])
        targets = targets.scatter_reduce(1, index, _take(x, merged), "mean", include_self=True)
        return torch.cat([_take(x, kept), targets], dim=1)

    def unmerge(self, y: Float[Tensor, "b kept c"], count: int) -> Float[Tensor, "b n c"]:
        """To every token its own row of what `merge(_, count)` gave, or that of its target."""
        self._check(count)
        kept, targets = y.split([self.source.shape[1] - count, self.target.shape[1]], dim=1)
        rows = torch.cat([_take(targets, self.chosen[:, :count]), kept, targets], dim=1)
        order = torch.cat([self.source, self.target], dim=1)
        return torch.zeros_like(rows).scatter(1, order[..., None].expand_as(rows), rows)

    def _check(self, count: int) -> None:
        if not 0 <= count <= self.source.shape[1]:
            raise ValueError(f"count is {count}, must be from 0 to {self.source.shape[1]}, the sources")


def match_tokens(
    x: Float[Tensor, "b n c"],
    *,
    size: tuple[int, int],
    stride: tuple[int, int],
    generator: torch.Generator | None = None,
) -> TokenMatch:
    """One target in every whole cell of a map; the other tokens choose the target of the largest cosine.

    size       (height, width) of the map, row by row in x
    stride     (height, width) of a cell; tokens in no whole cell are sources
    generator  where in its cell a target stands is drawn from it; None: at the first place

    No gradient passes through the choice. Raises ValueError unless x has height * width tokens and the map a
    whole cell. Source: token merging for Stable Diffusion, arXiv 2303.17604.
    """
    (height, width), (down, right) = size, stride
    check_positive("stride[0]", down)
    check_positive("stride[1]", right)
    if x.shape[1] != height * width:
        raise ValueError(f"x has {x.shape[1]} tokens, must have {height * width} for size {size}")
    rows, columns = height // down, width // right
    if rows < 1 or columns < 1:
        raise ValueError(f"stride is {stride}, must be at most size, which is {size}")
    place = torch.zeros(rows, columns, dtype=torch.int64)
    if generator is not None:
        place = torch.randint(down * right, (rows, columns), generator=generator, device=generator.device)
    place = place.to(x.device)
    top = torch.arange(rows, device=x.device)[:, None] * down
    left = torch.arange(columns, device=x.device) * right
    target = ((top + place // right) * width + left + place % right).flatten().sort().values
    stays = torch.zeros(height * width, dtype=torch.bool, device=x.device)
    stays[target] = True
    source = (~stays).nonzero()[:, 0]
    with torch.no_grad():
        unit = F.normalize(x, dim=-1)
        best, chosen = (unit[:, source] @ unit[:, target].mT).max(-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
    return TokenMatch(target.expand(len(x), -1), source[order], chosen.gather(1, order))


def _take(x: Float[Tensor, "b n c"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
