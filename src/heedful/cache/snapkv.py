"""SnapKV: once, after the prompt, each head keeps what the prompt's last queries attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from heedful.cache.layer import PolicyCache, PolicyLayer, per_layer
from heedful.cache.scores import last_weights
from heedful.checks import check_choice, check_positive
from heedful.hf.attention import Visibility
from heedful.patterns import Causal
from heedful.registry import register


@register("snapkv", kind="cache", paper="snapkv", tags=("cache", "eviction"))
class SnapKVCache(PolicyCache):
    """A cache that shrinks the prompt, once, to `capacity` entries for each KV head.

        s_j   = sum over the last `window` queries of their attention weight on key j
        kept  = the top capacity - window of pool(s) among the earlier tokens, and the last `window` tokens

    The prompt itself is attended in full; it is the first call of the model with this cache. Tokens of later
    calls are added and never dropped. Positions stay those of the text. A prompt of less than `capacity`
    tokens is kept whole. Query heads that share a KV head share its entries: their scores are reduced, so
    that KV heads stay unrepeated.

    model         a transformers model that runs attention implementation "heedful", or its configuration
    window        queries that vote, and tokens always kept
    capacity      entries kept, more than `window`
    kernel        width of the pooling over neighbours, odd
    pooling       "avg" (zeros beyond the ends count) or "max"
    group_reduce  "mean" or "max" over the query heads of a KV head

    The first four also take a list with one value for each layer.

        model.set_attn_implementation("heedful")
        model.generate(ids, past_key_values=SnapKVCache(model, capacity=1024))

    Raises ValueError on sizes that do not fit, and in the forward if attention does not run through heedful.
    Source: SnapKV, arXiv 2404.14469.
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        *,
        window: int | Sequence[int] = 32,
        capacity: int | Sequence[int] = 2048,
        kernel: int | Sequence[int] = 5,
        pooling: str | Sequence[str] = "avg",
        group_reduce: str = "mean",
    ) -> None:
        told = {"window": window, "capacity": capacity, "kernel": kernel, "pooling": pooling}
        columns = {name: per_layer(model, name, value) for name, value in told.items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        check_choice("group_reduce", group_reduce, ("mean", "max"))
        for row in rows:
            check_snapkv(**row)
        super().__init__(model, lambda i: SnapKVLayer(**rows[i], group_reduce=group_reduce))

    @classmethod
    def of_budget(cls, model: PreTrainedModel | PreTrainedConfig, budget: int) -> Self:
        """A prompt of `budget` entries a head, of which up to 32, at most half, are the window."""
        if budget < 2:
            raise ValueError(f"budget is {budget}, must be at least 2: a window and what it chooses")
        return cls(model, window=min(32, budget // 2), capacity=budget)


class SnapKVLayer(PolicyLayer):
    """One layer of a `SnapKVCache`."""

    needs_queries = True

    def __init__(self, *, window: int, capacity: int, kernel: int, pooling: str, group_reduce: str) -> None:
        super().__init__()
        self.window, self.capacity, self.kernel, self.pooling = window, capacity, kernel, pooling
        self.group_reduce = group_reduce

    def retain(self, query: Tensor | None, scale: float, told: Visibility | None) -> None:
        assert query is not None
        assert told is not None
        prompt = self.seen == query.shape[2]
        if not prompt or self.seen < self.capacity:
            return
        weights = last_weights(query, self.keys, last=self.window, scale=scale, told=told)
        groups = weights.unflatten(1, (self.keys.shape[1], -1)).sum(3)
        scores = groups.mean(2) if self.group_reduce == "mean" else groups.amax(2)
        pooled = _pooled(scores, self.window, self.kernel, self.pooling)
        if self.valid is not None:  # padding comes last
            pooled = pooled.masked_fill(~self.valid[:, None, : -self.window], -torch.inf)
        # Stable, so that of neighbours pooled to the same score the choice does not depend on padding.
        order = pooled.argsort(dim=-1, descending=True, stable=True)
        self.keep(_with_last(order[..., : self.capacity - self.window], self.seen, self.window))


def snapkv_select(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    *,
    window: int = 32,
    capacity: int = 2048,
    kernel: int = 5,
    pooling: str = "avg",
    scale: float | None = None,
) -> tuple[Float[Tensor, "b h k d"], Float[Tensor, "b h k e"]]:
    """The keys and values of a causal prompt that each head keeps, chosen for every query head by itself.

    As published: KV heads are repeated to query heads before, and the chosen tokens come in order of falling
    score, before the last `window` ones. A prompt of less than `capacity` tokens comes back as it is.
    Arguments, errors and source as in `SnapKVCache`; scale defaults to d ** -0.5.
    """
    check_snapkv(window=window, capacity=capacity, kernel=kernel, pooling=pooling)
    if query.shape[2] < capacity:
        return key, value
    told = Visibility(pattern=Causal(), bias=None, key_mask=None, query_offset=0)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = last_weights(query, key, last=window, scale=scale, told=told).sum(2)
    best = _pooled(scores, window, kernel, pooling).topk(capacity - window, dim=-1).indices
    index = _with_last(best, key.shape[2], window)[..., None]
    return (
        key.gather(2, index.expand(-1, -1, -1, key.shape[-1])),
        value.gather(2, index.expand(-1, -1, -1, value.shape[-1])),
    )


def _pooled(
    scores: Float[Tensor, "b h m"], window: int, kernel: int, pooling: str
) -> Float[Tensor, "b h old"]:
    """Scores of the tokens before the window, shared among neighbours."""
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    return pool(scores[..., : scores.shape[-1] - window], kernel, stride=1, padding=kernel // 2)


def _with_last(best: Int[Tensor, "b h old"], length: int, window: int) -> Int[Tensor, "b h k"]:
    last = torch.arange(length - window, length, device=best.device).expand(*best.shape[:2], -1)
    return torch.cat([best, last], dim=-1)


def check_snapkv(*, window: int, capacity: int, kernel: int, pooling: str) -> None:
    """A ValueError where these do not fit together."""
    for name, size in (("window", window), ("capacity", capacity), ("kernel", kernel)):
        check_positive(name, size)
    if capacity <= window:
        raise ValueError(f"capacity is {capacity}, must be more than window, which is {window}")
    if kernel % 2 == 0:
        raise ValueError(f"kernel is {kernel}, must be odd")
    check_choice("pooling", pooling, ("avg", "max"))
