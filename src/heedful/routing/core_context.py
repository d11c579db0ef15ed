"""Core tokens: every group of tokens far back stands as one, pooled by what its last token attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_positive
from heedful.patterns.pattern import Pattern
from heedful.registry import register


@register(
    "core-tokens", kind="routing", paper="core-context-aware", tags=("sparse", "pooling"), complexity="O(N C)"
)
def core_tokens(
    query: Float[Tensor, "b hq c d"],
    key: Float[Tensor, "b hkv n d"],
    value: Float[Tensor, "b hkv n e"],
    *,
    turned: Float[Tensor, "b hkv n d"] | None = None,
) -> tuple[Float[Tensor, "b hkv c d"], Float[Tensor, "b hkv c e"]]:
    """Core key and value of each group of n / c consecutive tokens.

        w = softmax over the group (q_last . k / sqrt(d)),  K = sum_j w_j k_j,  V = sum_j w_j v_j

    query   of the last token of each group; weights of query heads that share a KV head are averaged
    key     of all tokens, as the weights see them
    turned  keys that are summed in place of `key`, e.g. each turned to the position of its group's last token

    Join them with the tokens' own keys and let `CoreContext` say who sees which. Differentiable throughout.
    Raises ValueError if c does not divide n, or hkv does not divide hq.
    Source: Core Context Aware Transformers, arXiv 2412.12465.
    """
    groups, n = query.shape[2], key.shape[2]
    if (n % groups if groups else n) or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads and {groups} groups, must be a multiple of key's "
            f"{key.shape[1]} heads and a divisor of its {n} tokens"
        )
    wide = torch.promote_types(key.dtype, torch.float32)
    split = (groups, n // groups if groups else 1)
    keys, values, turned = (x.to(wide).unflatten(2, split) for x in (key, value, _or(turned, key)))
    last = query.to(wide).unflatten(1, (key.shape[1], -1)) * query.shape[-1] ** -0.5
    logits = torch.einsum("bhrcd,bhcgd->bhrcg", last, keys)
    weight = logits.softmax(-1).mean(2)[..., None, :]
    return (weight @ turned)[..., 0, :].to(key.dtype), (weight @ values)[..., 0, :].to(value.dtype)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


@dataclass(frozen=True)
class CoreContext(Pattern):
    """Keys are `cores` core tokens, then tokens from number `base` on; queries stand at token numbers q.

        J = max(0, floor((q + 1 - window) / group_size))
        visible: core tokens 0 .. J - 1, and tokens max(0, J group_size - 1) .. q

    So the window reaches back to the border of the last group that is seen as its core. With overlap=False it
    begins one token later: as published, the last token of that group is seen both in its core and by itself.
    Give `heedful.attention` the token number of the first query as `query_offset`.
    """

    cores: int
    group_size: int
    window: int
    overlap: bool = True
    base: int = 0
    exact_tiles = False

    def __post_init__(self) -> None:
        check_positive("group_size", self.group_size)
        check_positive("window", self.window)
        for name, value in (("cores", self.cores), ("base", self.base)):
            if value < 0:
                raise ValueError(f"{name} is {value}, must be at least 0")

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = self._cores_seen(q)
        token = k - self.cores + self.base
        return ((k < self.cores) & (k < seen)) | (
            (k >= self.cores) & (token >= self._first(seen)) & (token <= q)
        )

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        # More is seen of the cores from query to query, and the window moves on: its bounds never go back.
        least, most = self._cores_seen(q_lo), self._cores_seen(q_hi)
        has_cores, has_tokens = k_lo < self.cores, k_hi >= self.cores
        lo, hi = (k.maximum(k.new_tensor(self.cores)) - self.cores + self.base for k in (k_lo, k_hi))
        some = (has_cores & (k_lo < most)) | (has_tokens & (lo <= q_hi) & (hi >= self._first(least)))
        every = (~has_cores | (k_hi.clamp(max=self.cores - 1) < least)) & (
            ~has_tokens | ((hi <= q_lo) & (lo >= self._first(most)))
        )
        return some, every

    def _cores_seen(self, q: Tensor) -> Tensor:
        return ((q + 1 - self.window) // self.group_size).clamp(min=0)

    def _first(self, seen: Tensor) -> Tensor:
        return (seen * self.group_size - int(self.overlap)).clamp(min=0)
