"""Recycled attention: full steps now and then, and cheap steps over what the last full one attended to."""

from __future__ import annotations

from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from heedful.cache.layer import PolicyCache, PolicyLayer
from heedful.cache.scores import last_log_weights
from heedful.checks import check_choice, check_positive
from heedful.hf.attention import Visibility
from heedful.registry import register


@register("recycled-attention", kind="cache", paper="recycled-attention", tags=("cache", "recycling"))
class RecycledCache(PolicyCache):
    """A full cache of which most steps read only `tokens` entries a KV head.

        full step      attend to all; R = the `tokens` entries with the largest weights of the last query
        recycled step  attend to R and the new token; where R is then too long, its entry of least weight
                       in this step leaves

    Prompts are full steps. fixed schedule: every `stride`-th token is a full step. Dynamic schedule: every
    `check`-th token, a layer compares its query with that of its last full step, and takes a full step where
    their cosine, averaged over heads, is below `similarity`; each row of a batch by itself. Positions stay
    those of the text. Nothing is forgotten: the gain is time, not memory.

    model       a transformers model that runs attention implementation "heedful", or its configuration
    tokens      entries of R
    stride      tokens from full step to full step (fixed schedule); 1: every step is full
    similarity  the threshold of the dynamic schedule; None: the fixed one
    check       tokens from comparison to comparison (dynamic schedule)
    reduce      "max" or "mean" over the weights of the query heads of a KV head

    A step of comparison reads all entries, also where nothing comes of it. Raises ValueError on sizes that
    are no positive whole numbers, and in the forward if attention does not run through heedful.
    Source: Recycled Attention, arXiv 2411.05787.
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        *,
        tokens: int = 4096,
        stride: int = 50,
        similarity: float | None = None,
        check: int = 5,
        reduce: str = "max",
    ) -> None:
        for name, value in (("tokens", tokens), ("stride", stride), ("check", check)):
            check_positive(name, value)
        check_choice("reduce", reduce, ("max", "mean"))
        period = stride if similarity is None else check
        super().__init__(model, lambda _: RecycledLayer(tokens, period, similarity, reduce))

    @classmethod
    def of_budget(cls, model: PreTrainedModel | PreTrainedConfig, budget: int, *, stride: int = 10) -> Self:
        """Cheap steps over `budget` tokens."""
        check_positive("budget", budget)
        return cls(model, tokens=budget, stride=stride)


class RecycledLayer(PolicyLayer):
    """One layer of a `RecycledCache`.

    keys, values    all tokens up to the last step that read them all
    later_*         (b, hkv, later, d) the tokens since then
    near_*          (b, hkv, near, d) R, whose places in the text are `places` (b, hkv, near)
    last_query      (b, hq, d) of the last full step of each row
    """

    needs_queries = True
    rows = (
        *PolicyLayer.rows,
        *("later_keys", "later_values", "near_keys", "near_values", "places", "last_query"),
    )

    def __init__(self, tokens: int, period: int, similarity: float | None, reduce: str) -> None:
        super().__init__()
        self.tokens, self.period, self.similarity, self.reduce = tokens, period, similarity, reduce
        self._forget()

    def _forget(self) -> None:
        self.steps = 0  # single tokens since the prompt
        self.wide = True  # whether this step reads all
        self.later_keys: Tensor | None = None
        self.later_values: Tensor | None = None
        self.near_keys: Tensor | None = None
        self.near_values: Tensor | None = None
        self.places: Int[Tensor, "b hkv near"] | None = None
        self.last_query: Tensor | None = None
        self.hidden: Bool[Tensor, "b hkv m"] | None = None  # what a step of comparison does not see

    def reset(self) -> None:
        super().reset()
        self._forget()

    def held(self) -> int:
        later = 0 if self.later_keys is None else self.later_keys.shape[2]
        return super().held() + later

    # -- a step -------------------------------------------------------------------------------------

    def store(self, key: Float[Tensor, "b hkv n d"], value: Float[Tensor, "b hkv n e"]) -> None:
        single = self.is_initialized and key.shape[2] == 1
        self.steps = self.steps + 1 if single else 0
        self.wide = not single or self.steps % self.period == 0
        if self.wide:
            if self.later_keys is not None:
                assert self.later_values is not None
                key, value = torch.cat([self.later_keys, key], 2), torch.cat([self.later_values, value], 2)
                self.later_keys = self.later_values = None
            super().store(key, value)
            return
        self.later_keys, self.later_values = _joined(self.later_keys, key), _joined(self.later_values, value)
        self.near_keys, self.near_values = _joined(self.near_keys, key), _joined(self.near_values, value)
        assert self.places is not None
        self.places = F.pad(self.places, (0, 1), value=self.seen)

    def read(self) -> tuple[Float[Tensor, "b hkv m d"], Float[Tensor, "b hkv m e"]]:
        if self.wide:
            return self.keys, self.values
        assert self.near_keys is not None
        assert self.near_values is not None
        return self.near_keys, self.near_values

    def readable(self) -> Bool[Tensor, "..."] | None:
        if self.valid is None or self.wide:
            return self.valid
        assert self.places is not None
        return self.valid[:, None].expand(-1, self.places.shape[1], -1).gather(2, self.places)

    def see(self, query: Float[Tensor, "b hq n d"], told: Visibility) -> Visibility:
        """In a step of comparison, rows whose query is like that of their last full step see only R."""
        told = super().see(query, told)
        self.hidden = None
        if self.similarity is None or not self.wide:
            return told
        last = query[:, :, -1].clone()
        if self.steps == 0 or self.last_query is None:
            self.last_query = last
            return told
        cosine = F.cosine_similarity(last.float(), self.last_query.float(), dim=-1).mean(1)
        full = cosine < self.similarity
        self.last_query = torch.where(full[:, None, None], last, self.last_query)
        if full.all():
            return told
        assert self.places is not None
        near = torch.zeros(*self.places.shape[:2], self.seen, dtype=torch.bool, device=query.device)
        near.scatter_(2, self.places, True)
        near[..., -1] = True
        self.hidden = ~(near | full[:, None, None])
        hidden = self.hidden.repeat_interleave(query.shape[1] // near.shape[1], dim=1)[:, :, None]
        bias = query.new_zeros(()).masked_fill(hidden, -torch.inf)
        return {**told, "bias": bias if told["bias"] is None else told["bias"] + bias}

    def retain(self, query: Tensor | None, scale: float, told: Visibility | None) -> None:
        assert query is not None
        assert told is not None
        keys, values = self.read()
        m = keys.shape[2]
        if not self.wide and m <= self.tokens:
            return
        weights = last_log_weights(query, keys, last=1, scale=scale, told=told)[:, :, 0].unflatten(
            1, (keys.shape[1], -1)
        )
        scores = weights.amax(2) if self.reduce == "max" else weights.logsumexp(2)
        if (mask := self.readable()) is not None:  # padding leaves first
            scores = scores.masked_fill(~(mask if mask.ndim == 3 else mask[:, None]), -torch.inf)
        if self.hidden is not None:
            scores = scores.masked_fill(self.hidden, -torch.inf)
            self.hidden = None
        best = scores.topk(min(self.tokens, m), dim=-1).indices.sort(dim=-1).values
        self.near_keys = keys.gather(2, best[..., None].expand(-1, -1, -1, keys.shape[-1]))
        self.near_values = values.gather(2, best[..., None].expand(-1, -1, -1, values.shape[-1]))
        if not self.wide:
            assert self.places is not None
            best = self.places.gather(2, best)
        self.places = best


def _joined(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old, new], dim=2)
