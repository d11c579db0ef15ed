"""Sparse prompts by DHSA: blocks of queries spend a budget of keys on the chunks they like best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from heedful.cache.layer import PolicyCache, PolicyLayer, per_layer
from heedful.checks import check_positive
from heedful.hf.attention import Visibility
from heedful.patterns import Pattern
from heedful.registry import register
from heedful.routing.boundary_predictor import BoundaryPredictor, published_boundaries
from heedful.routing.chunk_topk import chunk_topk
from heedful.selection import TokenGroups


@dataclass(frozen=True)
class _Rule:
    budget: int
    block_size: int
    chunk_size: int
    local_tokens: int
    global_tokens: int
    instruction_tokens: int
    threshold: float
    nms_window: int
    chunk_beta: int


@register("dhsa-prefill", kind="cache", paper="dhsa", tags=("cache", "sparse", "prefill"))
class DHSAPrefillCache(PolicyCache):
    """A full cache behind which long prompts attend sparsely; single tokens attend to everything.

        score(block, chunk) = mean query of the block . mean key of the chunk * sqrt(length of the chunk)

    The prompt's keys are cut into chunks. Each block of `block_size` queries, all heads together, sees at
    most `budget` keys: the last `local_tokens` up to its end, the first `global_tokens`, and those of the
    chunks with the best scores. The last `instruction_tokens` queries of a call see everything, and so does
    a call of no more tokens than that. Nothing is forgotten: the gain is the time of the prompt, O(n budget)
    in place of O(n^2). Where the budget covers all keys nothing changes. Blocks and chunks count real tokens,
    so that padding is without influence. A prompt fed in pieces is routed piece by piece, over all keys so
    far.

    model           a transformers model that runs attention implementation "heedful", or its configuration
    chunk_size      tokens a chunk, where no predictor says where chunks end
    predictor       a trained `heedful.routing.boundary_predictor.BoundaryPredictor` of KV heads times head
                    width channels, or a list of one (or None) for each layer; None: chunks of one size
    threshold, nms_window, chunk_beta   of the choice among the predictor's gaps: logits above `threshold`,
                    more than `nms_window` apart, at most chunk_beta for each block of the text

    A block's choice hangs on all its queries, so that within a block later tokens have a say in what earlier
    ones see, as published. Raises ValueError on sizes that are no positive whole numbers, if local_tokens is
    less than block_size or more than what global_tokens leave of the budget, and in the forward if attention
    does not run through heedful.
    Source: DHSA, arXiv 2510.24606.
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        *,
        budget: int = 1024,
        block_size: int = 64,
        chunk_size: int = 16,
        local_tokens: int = 128,
        global_tokens: int = 128,
        instruction_tokens: int = 64,
        predictor: BoundaryPredictor | Sequence[BoundaryPredictor | None] | None = None,
        threshold: float = 1.1,
        nms_window: int = 8,
        chunk_beta: int = 8,
    ) -> None:
        for name, value in (
            ("budget", budget),
            ("block_size", block_size),
            ("chunk_size", chunk_size),
            ("instruction_tokens", instruction_tokens),
            ("chunk_beta", chunk_beta),
        ):
            check_positive(name, value)
        if local_tokens < block_size:
            raise ValueError(
                f"local_tokens is {local_tokens}, must be at least block_size, which is {block_size}: "
                "a query sees itself"
            )
        if global_tokens < 0 or local_tokens + global_tokens > budget:
            raise ValueError(
                f"local_tokens + global_tokens is {local_tokens} + {global_tokens}, must be at most budget, "
                f"which is {budget}"
            )
        rule = _Rule(
            budget,
            block_size,
            chunk_size,
            local_tokens,
            global_tokens,
            instruction_tokens,
            threshold,
            nms_window,
            chunk_beta,
        )
        predictors = per_layer(model, "predictor", predictor)
        super().__init__(model, lambda i: DHSAPrefillLayer(rule, predictors[i]))

    @classmethod
    def of_budget(cls, model: PreTrainedModel | PreTrainedConfig, budget: int) -> Self:
        """Sparse prompts of `budget` keys a query, an eighth of them local and an eighth global."""
        if budget < 8:
            raise ValueError(f"budget is {budget}, must be at least 8: local, global and chosen keys")
        eighth = min(128, budget // 8)
        return cls(
            model,
            budget=budget,
            block_size=min(64, eighth),
            chunk_size=min(16, eighth),
            local_tokens=eighth,
            global_tokens=eighth,
        )


class DHSAPrefillLayer(PolicyLayer):
    """One layer of a `DHSAPrefillCache`."""

    needs_queries = True

    def __init__(self, rule: _Rule, predictor: BoundaryPredictor | None) -> None:
        super().__init__()
        self.rule, self.predictor = rule, predictor

    def see(self, query: Float[Tensor, "b hq n d"], told: Visibility) -> Visibility:
        told = super().see(query, told)
        n, m = query.shape[2], self.keys.shape[2]
        if n <= self.rule.instruction_tokens or m <= self.rule.budget:
            return told
        with torch.no_grad():
            rows = [self._row(query[b], b) for b in range(len(query))]
        return {**told, "pattern": _Routed.of(rows, (n, m), told["pattern"])}

    def _row(self, query: Float[Tensor, "hq n d"], b: int) -> _Blocks:
        """The choice for one batch row, first by place among its real tokens, then by column."""
        rule, n, m = self.rule, query.shape[1], self.keys.shape[2]
        column = torch.arange(m, device=query.device)
        if self.valid is not None:
            column = column[self.valid[b]]
        queries = column[column >= m - n] - (m - n)
        past, sparse = len(column) - len(queries), max(0, len(queries) - rule.instruction_tokens)
        key = self.keys[b : b + 1, :, column]
        chosen = chunk_topk(
            query[None, :, queries[:sparse]],
            key,
            self._boundaries(key, past + sparse),
            block_size=rule.block_size,
            budget=rule.budget,
            local_tokens=rule.local_tokens,
            global_tokens=rule.global_tokens,
            query_offset=past,
        )[0]
        keys = torch.where(chosen >= 0, column[chosen], -1)
        return _Blocks(_cut(queries[:sparse], rule.block_size), keys, queries[sparse:], column)

    def _boundaries(self, key: Float[Tensor, "1 hkv m d"], end: int) -> Int[Tensor, "1 c"]:
        rule, m = self.rule, key.shape[2]
        if self.predictor is None:
            starts = torch.arange(0, m, rule.chunk_size, device=key.device)
            return F.pad(starts, (0, 1), value=m)[None]
        tokens = key.transpose(1, 2).flatten(2).to(self.predictor.attention.in_proj_weight.dtype)
        return published_boundaries(
            self.predictor(tokens),
            window=self.predictor.window,
            threshold=rule.threshold,
            most=m // rule.block_size * rule.chunk_beta,
            distance=rule.nms_window,
            end=end,
        )


@dataclass(frozen=True)
class _Blocks:
    """Of one batch row: blocks of queries with their keys, the queries that see all, and all its keys."""

    queries: Int[Tensor, "g size"]
    keys: Int[Tensor, "g k"]
    rest: Int[Tensor, " r"]
    real: Int[Tensor, " m2"]

    def groups(self, width: int) -> tuple[Int[Tensor, "g2 size"], Int[Tensor, "g2 width"]]:
        """Groups of equal width: what sees all keys is in several groups, a part of the keys in each."""
        rest, parts = _cut(self.rest, self.queries.shape[1]), _cut(self.real, width)
        keys = F.pad(self.keys, (0, width - self.keys.shape[1]), value=-1)
        return (
            torch.cat([self.queries, rest.repeat_interleave(len(parts), dim=0)]),
            torch.cat([keys, parts.repeat(len(rest), 1)]),
        )


@dataclass(frozen=True, eq=False)
class _Routed(Pattern):
    """What the model shows, of what the blocks chose.

    block  (b, n) the block of each query;  table  (b, blocks, m) what its queries may see
    """

    selection: TokenGroups
    block: Int[Tensor, "b n"]
    table: Bool[Tensor, "b blocks m"]
    inner: Pattern | None

    @classmethod
    def of(cls, rows: list[_Blocks], shape: tuple[int, int], inner: Pattern | None) -> _Routed:
        n, m = shape
        width = max(1, max(row.keys.shape[1] for row in rows))
        made = [row.groups(width) for row in rows]
        most = max(len(queries) for queries, _ in made)
        queries, keys = (
            torch.stack([F.pad(x, (0, 0, 0, most - len(x)), value=-1) for x in parts])[:, None]
            for parts in zip(*made, strict=True)
        )
        blocks = max(len(row.queries) for row in rows)
        device = queries.device
        # Two blocks more: of the queries that see all, and of padding, which sees nothing.
        block = torch.full((len(rows), n), blocks + 1, device=device)
        table = torch.zeros(len(rows), blocks + 2, m + 1, dtype=torch.bool, device=device)
        for b, row in enumerate(rows):
            live = row.queries >= 0
            block[b, row.queries[live]] = torch.arange(len(live), device=device)[:, None].expand_as(live)[
                live
            ]
            block[b, row.rest] = blocks
            table[b, : len(live)].scatter_(1, torch.where(row.keys >= 0, row.keys, m), True)
            table[b, blocks, row.real] = True
        return cls(TokenGroups(queries, keys, shape), block, table[..., :m], inner)

    @property
    def batch(self) -> int:
        return len(self.block)

    @property
    def heads(self) -> int:
        return 1 if self.inner is None else self.inner.heads

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        n, m = self.selection.shape
        seen = self.table[b, self.block[b, q - (m - n)], k]
        return seen if self.inner is None else seen & self.inner.visible(b, h, q, k)

    def groups(self, n: int, m: int, query_offset: int, device: torch.device) -> TokenGroups:
        if self.inner is None:
            return self.selection
        # A mask that distinguishes heads or batch rows needs groups that do.
        index = self.selection.query_index.expand(max(self.batch, self.inner.batch), self.heads, -1, -1)
        return replace(self.selection, query_index=index, mask_fn=self.inner.mask_fn(query_offset))


def _cut(x: Int[Tensor, " n"], size: int) -> Int[Tensor, "parts size"]:
    """Parts of `size` entries, the last one filled up with -1."""
    return F.pad(x, (0, -len(x) % size), value=-1).view(-1, size)
