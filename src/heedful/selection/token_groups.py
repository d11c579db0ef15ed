"""`TokenGroups`: groups of queries, each with its own gathered keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.selection.block_table import MaskFn


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Groups of queries with the keys each group sees; -1 pads; broadcast over batch and heads.

    query_index   (b|1, h|1, g, queries a group): row numbers
    key_index     (b|1, h|1, g, keys a group): column numbers
    mask_fn       decides inside a group which pairs are visible; None: all of them
    key_bias      (b|1, h|1, g, keys a group): added to the logits of a key, e.g. the logarithm of how
                  many tokens it stands for
    query_weight  (b|1, h|1, g, queries a group): None means that a query in several groups takes one
                  softmax over all its keys; given, each group has its own softmax and the results are
                  added with these weights
    shape         (n, m), the numbers of queries and keys
    A query's groups must name disjoint keys unless query_weight is given; queries in no group see nothing.
    """

    query_index: Int[Tensor, "b h g lq"]
    key_index: Int[Tensor, "b2 h2 g lk"]
    shape: tuple[int, int]
    mask_fn: MaskFn | None = None
    key_bias: Float[Tensor, "b3 h3 g lk"] | None = None
    query_weight: Float[Tensor, "b4 h4 g lq"] | None = None

    def __post_init__(self) -> None:
        if self.query_index.shape[2] != self.key_index.shape[2]:
            raise ValueError(
                f"query_index has {self.query_index.shape[2]} groups and key_index "
                f"{self.key_index.shape[2]}, must be the same number"
            )
        for name, extra, like in (
            ("key_bias", self.key_bias, self.key_index),
            ("query_weight", self.query_weight, self.query_index),
        ):
            if extra is not None and extra.shape[2:] != like.shape[2:]:
                raise ValueError(
                    f"{name} ends in {tuple(extra.shape[2:])}, must end in {tuple(like.shape[2:])}"
                )

    def visited(self) -> float:
        """Share of the n x m matrix that lies in groups, the mean over batch and heads."""
        n, m = self.shape
        cells = (self.query_index >= 0).sum(-1) * (self.key_index >= 0).sum(-1)
        leading = cells.shape[0] * cells.shape[1]
        return float(cells.sum()) / (leading * n * m) if n * m else 0.0

    def pair_mask(self) -> Bool[Tensor, "b h g lq lk"]:
        """Which pairs of each group are visible."""
        row, col = self.query_index[..., :, None], self.key_index[..., None, :]
        live = (row >= 0) & (col >= 0)
        if self.mask_fn is None:
            return live
        b, h = live.shape[:2]
        ib = torch.arange(b, device=live.device).view(-1, 1, 1, 1, 1)
        ih = torch.arange(h, device=live.device).view(1, -1, 1, 1, 1)
        return live & self.mask_fn(ib, ih, row.clamp(min=0), col.clamp(min=0))

    def dense(self, batch: int = 1, heads: int = 1) -> Bool[Tensor, "b h n m"]:
        """The pairs that lie in any group (for tests and pictures)."""
        n, m = self.shape
        pairs = self.pair_mask()
        b, h = torch.broadcast_shapes((batch, heads), pairs.shape[:2])
        row = self.query_index[..., :, None].clamp(min=0)
        col = self.key_index[..., None, :].clamp(min=0)
        cell = (row * m + col).expand(pairs.shape).expand(b, h, *pairs.shape[2:]).flatten(2)
        seen = torch.zeros(b, h, n * m, dtype=torch.int64, device=pairs.device)
        seen.scatter_add_(-1, cell, pairs.expand(b, h, *pairs.shape[2:]).flatten(2).long())
        return seen.view(b, h, n, m) > 0
