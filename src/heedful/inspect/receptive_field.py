"""How far a stack of layers with a pattern can see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int, Int16
from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.pattern import Pattern
from heedful.registry import register
from heedful.selection import FULL, BlockTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ALL_UP_TO = 4096  # tokens up to which every query is followed unless the caller names some
_SAMPLED = 64  # queries followed beyond
_BLOCK = 128


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """What each followed query can draw on through a stack of layers.

    queries  the positions that were followed, ascending
    depth    for each of them and each token, the least number of layers that brings the token there; 0 for
             the query itself, -1 for never
    layers   the layers of the stack (where the caller named no number: after how many nothing new came)
    """

    queries: Int[Tensor, " q"]
    depth: Int16[Tensor, "q n"]
    layers: int

    @property
    def n(self) -> int:
        """Tokens."""
        return self.depth.shape[1]

    @property
    def reached(self) -> Bool[Tensor, "q n"]:
        """Which tokens reach each query."""
        return self.depth >= 0

    @property
    def counts(self) -> Int[Tensor, "layers q"]:
        """How many tokens reach each query after 1, 2, ... layers, itself counted."""
        after = [(self.reached & (self.depth <= layer)).sum(1) for layer in range(1, self.layers + 1)]
        return torch.stack(after) if after else self.depth.new_zeros(0, len(self.queries), dtype=torch.int64)

    @property
    def causal(self) -> bool:
        """No query is reached by a later token."""
        later = torch.arange(self.n) > self.queries[:, None]
        return not bool((self.reached & later).any())

    def unreached(self, query: int | None = None) -> Int[Tensor, " k"]:
        """The positions that never reach a followed query, by default the last one.

        If no query is reached by later tokens, only positions up to the query are counted.
        ValueError if the query was not followed.
        """
        found = [len(self.queries) - 1] if query is None else (self.queries == query).nonzero()[:, 0].tolist()
        if not found:
            raise ValueError(f"query is {query}, must be one of those followed: {self.queries.tolist()}")
        missing = ~self.reached[found[0]]
        if self.causal:
            missing[int(self.queries[found[0]]) + 1 :] = False
        return missing.nonzero()[:, 0]

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draw how many layers bring each token to each query, and return the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(5, 4), layout="constrained")
        shown = torch.where(self.reached, self.depth.float(), torch.nan)
        drawn = ax.imshow(shown, cmap="viridis_r", vmin=0, aspect="auto", interpolation="nearest")
        ax.set_facecolor("white")
        ticks = sorted({0, len(self.queries) // 2, len(self.queries) - 1})
        ax.set_yticks(ticks, [str(int(self.queries[t])) for t in ticks])
        ax.set(xlabel="token position", ylabel="query position", title="layers needed (white: never)")
        ax.figure.colorbar(drawn, ax=ax, label="layers")
        return ax

    def __str__(self) -> str:
        last = int(self.reached[-1].sum()) if len(self.queries) else 0
        return (
            f"{self.layers} layers, {self.n} tokens: the query at {int(self.queries[-1])} is reached by "
            f"{last} tokens, {len(self.unreached())} never reach it"
        )


@register("receptive-field", kind="inspect", paper="power-attention", tags=("patterns",))
@torch.no_grad()
def receptive_field(
    pattern: Pattern | Sequence[Pattern],
    layers: int | None,
    n: int,
    *,
    queries: Sequence[int] | None = None,
) -> ReceptiveField:
    """Which tokens a stack of attention layers can bring to a query, and over how many layers.

        S_0 = {query},  S_(d+1) = S_d and all keys that the pattern shows to a token of S_d

    Layers are residual, so what was reached stays. A key counts as visible if any head (and batch row) of
    the pattern sees it, because the next layer mixes heads.

    pattern  one for all layers, or one a layer from bottom to top (depth is then counted from the top)
    layers   how many; None: until nothing new is reached, so that -1 in `depth` means never at any depth
    n        tokens
    queries  positions to follow. None: all up to 4096 tokens, beyond that 64, evenly spread, the last among
             them

    Exact. Only the pattern's block table and a q x n table of depths are held, no n x n buffer; the work
    is q times the pairs that the pattern shows, a layer. ValueError where numbers do not fit.
    Source: the analysis of PowerAttention, arXiv 2503.03588.
    """
    check_positive("n", n)
    stack = [pattern] if isinstance(pattern, Pattern) else list(pattern)
    if layers is not None and (not isinstance(layers, int) or layers < 0):
        raise ValueError(f"layers is {layers!r}, must be a whole number of at least 0, or None")
    if not isinstance(pattern, Pattern) and layers != len(stack):
        raise ValueError(f"layers is {layers}, must be {len(stack)}, the number of patterns")
    rows = _followed(n, queries)
    depth = torch.full((len(rows), n), -1, dtype=torch.int16)
    depth[torch.arange(len(rows)), rows] = 0
    tiles: dict[Pattern, _Tiles] = {}
    done = 0
    while layers is None or done < layers:
        own = stack[0] if isinstance(pattern, Pattern) else stack[layers - 1 - done]  # type: ignore[operator]
        if own not in tiles:
            tiles[own] = _Tiles(own, n)
        reached = tiles[own].step(depth >= 0)
        new = reached & (depth < 0)
        if not bool(new.any()) and isinstance(pattern, Pattern):
            done = done if layers is None else layers  # nothing comes from further layers either
            break
        done += 1
        depth[new] = done
    return ReceptiveField(rows, depth, done)


def _followed(n: int, queries: Sequence[int] | None) -> Int[Tensor, " q"]:
    if queries is None:
        if n <= _ALL_UP_TO:
            return torch.arange(n)
        return torch.linspace(0, n - 1, _SAMPLED, dtype=torch.float64).round().long()
    if not queries or not all(0 <= q < n for q in queries):
        raise ValueError(f"queries is {list(queries)}, must hold positions from 0 to {n - 1}")
    return torch.tensor(sorted(set(queries)))


class _Tiles:
    """The block table of the union of a pattern's heads, walked over row by row."""

    def __init__(self, pattern: Pattern, n: int) -> None:
        union = pattern if pattern.heads == pattern.batch == 1 else _Union(pattern)
        self.table: BlockTable = union.block_table(n, block_size=(_BLOCK, _BLOCK))
        self.n = n

    def step(self, reached: Bool[Tensor, "q n"]) -> Bool[Tensor, "q n"]:
        """What is reached one layer further down."""
        found = reached.clone()
        for start, stop, columns, seen in self._rows():
            own = reached[:, start:stop]
            live = own.any(1)
            if columns.numel() and bool(live.any()):
                # Counts of ways are sums of ones: above 0 iff there is a way.
                ways = own[live].float() @ seen.float()
                found[live.nonzero(), columns[None]] |= ways > 0
        return found

    def _rows(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """For each query block [start, stop): the columns of its key blocks and the mask over them."""
        zero = torch.zeros((), dtype=torch.int64)
        for i in range(self.table.count.shape[2]):
            many = int(self.table.count[0, 0, i])
            start, stop = i * _BLOCK, min((i + 1) * _BLOCK, self.n)
            blocks = self.table.index[0, 0, i, :many]
            columns = (blocks[:, None] * _BLOCK + torch.arange(_BLOCK)).flatten()
            full = (self.table.kind[0, 0, i, :many] == FULL).repeat_interleave(_BLOCK)
            inside = columns < self.n
            columns, full = columns[inside], full[inside]
            seen = full.expand(stop - start, -1)
            if self.table.mask_fn is not None and not bool(full.all()):
                row = torch.arange(start, stop)[:, None]
                partial = self.table.mask_fn(zero, zero, row, columns[~full][None])
                seen = seen.clone()
                seen[:, ~full] = partial.expand(stop - start, -1)
            yield start, stop, columns, seen


class _Union(Pattern):
    """What any head or batch row of a pattern sees."""

    def __init__(self, inner: Pattern) -> None:
        self.inner = inner

    def check(self, n: int, m: int, query_offset: int) -> None:
        self.inner.check(n, m, query_offset)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found = torch.zeros(torch.broadcast_shapes(q.shape, k.shape), dtype=torch.bool)
        for row in range(self.inner.batch):
            for head in range(self.inner.heads):
                found |= self.inner.visible(torch.full_like(q, row), torch.full_like(q, head), q, k)
        return found

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.inner.batch, self.inner.heads, q_lo.shape[0], k_lo.shape[1])
        some, every = (t.expand(shape).flatten(0, 1).any(0) for t in self.inner.tiles(q_lo, q_hi, k_lo, k_hi))
        return some, every
