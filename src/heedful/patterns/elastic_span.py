"""A sink and a window that grows with the length, at another rate in every head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.pattern import Pattern
from heedful.patterns.table import Table
from heedful.registry import register


@register("elastic-span", kind="pattern", paper="moa", tags=("sparse", "causal", "window", "sink", "heads"))
@dataclass(frozen=True)
class ElasticSpan(Pattern):
    """A query sees the first tokens and a span before it of alpha + beta N tokens, N being the length.

    In blocks of `block_size` tokens, i of the query and j of the key, visible iff k <= q and
      k < sink, or
      i - j < max(1, trunc(floor(alpha / block_size) + beta N')),  N' = N in blocks, rounded up.

    alpha   in tokens, may be negative; beta between 0 and 1. One number, or one a head
    sink    in tokens, a multiple of block_size
    length  N in tokens. None: every query takes the number of tokens up to its own block's end, so that
            what comes later changes nothing for it

    ValueError where numbers do not fit. The query's own block is always visible.
    Source: MoA, arXiv 2406.14909.
    """

    example: ClassVar[dict[str, Any]] = {"alpha": (2, -2), "beta": (0.0, 0.5), "sink": 2, "block_size": 2}

    alpha: float | int | Sequence[float | int]
    beta: float | int | Sequence[float | int]
    sink: int = 64
    block_size: int = 64
    length: int | None = None
    exact_tiles = True
    _alphas: ClassVar[Table]  # set on the instance, and no part of its value
    _betas: ClassVar[Table]

    def __post_init__(self) -> None:
        check_positive("block_size", self.block_size)
        if self.length is not None:
            check_positive("length", self.length)
        if not isinstance(self.sink, int) or self.sink < 0 or self.sink % self.block_size:
            raise ValueError(
                f"sink is {self.sink!r}, must be a multiple of block_size, which is {self.block_size}"
            )
        rules = {}
        for name in ("alpha", "beta"):
            given = getattr(self, name)
            rules[name] = tuple(float(x) for x in given) if isinstance(given, Sequence) else (float(given),)
        heads = max(map(len, rules.values()))
        for name, rule in rules.items():
            if len(rule) not in (1, heads) or not rule:
                raise ValueError(
                    f"{name} has {len(rule)} numbers, must have one, or one for each of {heads} heads"
                )
            object.__setattr__(self, name, rule * (heads // len(rule)))
        if any(not 0 <= x <= 1 for x in rules["beta"]):
            raise ValueError(f"beta is {list(rules['beta'])}, must lie between 0 and 1")
        alpha, beta = (torch.tensor(getattr(self, n), dtype=torch.float64) for n in ("alpha", "beta"))
        object.__setattr__(self, "_alphas", Table(torch.div(alpha, self.block_size, rounding_mode="floor")))
        object.__setattr__(self, "_betas", Table(beta))

    @property
    def heads(self) -> int:
        assert isinstance(self.alpha, tuple)
        return len(self.alpha)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        i, j = q // self.block_size, k // self.block_size
        return (k <= q) & ((k < self.sink) | (j >= self._first(h, i)))

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        i_lo, i_hi, j_lo, j_hi = (x // self.block_size for x in (q_lo, q_hi, k_lo, k_hi))
        h = torch.arange(self.heads, device=q_lo.device).view(1, -1, 1, 1)
        # `_first` never falls as i grows: the first query block at or behind the keys sees furthest back.
        near = self._first(h, i_lo.maximum(j_lo)) <= j_hi
        some = (k_lo <= q_hi) & ((k_lo < self.sink) | near)
        first = k_lo.clamp(min=self.sink)  # keys before it are sinks
        every = (k_hi <= q_lo) & ((first > k_hi) | (self._first(h, i_hi) <= first // self.block_size))
        return some, every

    def spans(self, blocks: int) -> Int[Tensor, " h"]:
        """Blocks of the span of each head, the query's own counted, at a length of so many blocks."""
        a, b = (table.on(torch.device("cpu")) for table in (self._alphas, self._betas))
        return (a + b * blocks).trunc().long().clamp(min=1)

    def kv_density(self, n: int) -> Float[Tensor, " h"]:
        """Of each head, the share of n keys that the last query sees, in blocks."""
        blocks = -(-n // self.block_size)
        rule = blocks if self.length is None else -(-self.length // self.block_size)
        return (self.spans(rule) + self.sink // self.block_size).clamp(max=blocks).double() / blocks

    def cache_sizes(self, tokens: int, *, minimum: int = 128) -> tuple[Int[Tensor, " h"], Int[Tensor, " h"]]:
        """(size, static): keys that a decoding cache of each head holds, and how many of them stay for ever.

        tokens: the prompt and all that will be generated, which is N here. A size is at least `minimum`
        and a multiple of block_size.
        """
        check_positive("tokens", tokens)
        alpha, beta = (torch.tensor(x, dtype=torch.float64) for x in (self.alpha, self.beta))
        size = (alpha + tokens * beta).trunc().long().clamp(max=tokens).clamp(min=minimum)
        size = (size + self.block_size - 1) // self.block_size * self.block_size
        return size, size.clamp(max=self.sink)

    def _first(self, h: Tensor, i: Tensor) -> Tensor:
        """The first block of the span of query block i."""
        a, b = self._alphas.on(i.device), self._betas.on(i.device)
        # Tables of one head are for all heads.
        a, b = (x[h] if self.heads > 1 else x[0] for x in (a, b))
        blocks = i + 1 if self.length is None else -(-self.length // self.block_size)
        return i + 1 - (a + b * blocks).trunc().long().clamp(min=1)

    def __str__(self) -> str:
        rule = ", ".join(str(x[0]) if len(set(x)) == 1 else "..." for x in (self.alpha, self.beta))  # type: ignore[arg-type, index]
        return f"ElasticSpan({rule})"
