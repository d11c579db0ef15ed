"""One attention call of a model, as those who look at it or change it are shown it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heedful.patterns import Pattern


class Visibility(TypedDict):
    """Who sees whom in a call, as `heedful.attention` takes it."""

    pattern: Pattern | None
    bias: Tensor | None
    key_mask: Bool[Tensor, "b m"] | None
    query_offset: int


@dataclass
class Site:
    """One attention call of a model, before it is computed.

    name      of the attention module in the model, e.g. "model.layers.3.self_attn"
    layer     its layer_idx, or where it has none the first number in its name
    cross     whether the keys are those of another sequence
    key and value keep the model's KV heads, unrepeated. Dense tables are made when asked for, for all query
    rows or for some of them, so that long inputs can be looked at in pieces.
    """

    module: nn.Module
    name: str
    layer: int
    cross: bool
    query: Float[Tensor, "b hq n d"]
    key: Float[Tensor, "b hkv m d"]
    value: Float[Tensor, "b hkv m e"]
    scale: float
    visibility: Visibility
    softcap: float | None = None
    sink_logits: Float[Tensor, " hq"] | None = None
    notes: dict[str, Any] = field(default_factory=dict)  # for handlers to hand on within the call

    @property
    def prefill(self) -> bool:
        """Whether more than one query is asked at once."""
        return self.query.shape[2] > 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(b, hq, n, m): that of the whole table of weights."""
        b, h, n, _ = self.query.shape
        return b, h, n, self.key.shape[2]

    def pieces(self, scores: int = 1 << 22) -> Iterator[slice]:
        """Slices of query rows, in order, whose tables hold at most `scores` entries (one row at least)."""
        b, h, n, m = self.shape
        step = max(1, scores // max(1, b * h * m))
        for first in range(0, n, step):
            yield slice(first, min(n, first + step))

    def query_positions(self, rows: slice = slice(None)) -> Int[Tensor, " r"]:
        """Where the queries stand among the keys, whose positions are 0, 1, 2, ..."""
        return torch.arange(self.query.shape[2], device=self.query.device)[rows] + self._offset

    @cached_property
    def _offset(self) -> int:
        return self.visibility["query_offset"]

    def visible(self, rows: slice = slice(None)) -> Bool[Tensor, "b hq r m"]:
        """The pairs that the model lets see each other, broadcast over what they do not depend on."""
        n, m = self.query.shape[2], self.key.shape[2]
        device = self.query.device
        seen = torch.ones(1, 1, len(range(*rows.indices(n))), m, dtype=torch.bool, device=device)
        pattern, key_mask = self.visibility["pattern"], self.visibility["key_mask"]
        if pattern is not None:
            b = torch.arange(pattern.batch, device=device)[:, None, None, None]
            h = torch.arange(pattern.heads, device=device)[:, None, None]
            q = self.query_positions(rows)[:, None]
            seen = seen & pattern.visible(b, h, q, torch.arange(m, device=device))
        return seen if key_mask is None else seen & key_mask[:, None, None]

    def logits(self, rows: slice = slice(None)) -> Float[Tensor, "b hq r m"]:
        """scale q . k, soft-capped and with the model's bias; -inf where the model hides the key."""
        query = self.query[:, :, rows]
        groups = query.shape[1] // self.key.shape[1]
        logits = query.unflatten(1, (-1, groups)) @ self.key[:, :, None].transpose(-2, -1) * self.scale
        logits = logits.flatten(1, 2)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        bias = self.visibility["bias"]
        if bias is not None:
            logits = logits + (bias[..., rows, :] if bias.shape[-2] > 1 else bias)
        return logits.masked_fill(~self.visible(rows), -torch.inf)

    def weights(self, rows: slice = slice(None)) -> Float[Tensor, "b hq r m"]:
        """The attention weights; zeros in rows that see nothing."""
        return self.softmax(self.logits(rows))

    def lse(self, rows: slice = slice(None)) -> Float[Tensor, "b hq r"]:
        """The logarithm of the softmax denominator, in float32, the sink logit included."""
        lse = self.logits(rows).float().logsumexp(-1)
        if self.sink_logits is not None:
            lse = torch.logaddexp(lse, self.sink_logits.float()[:, None])
        return lse

    def softmax(self, logits: Float[Tensor, "b hq r m"]) -> Float[Tensor, "b hq r m"]:
        """Logits as weights, in float32 as models have it (float64 stays); a sink logit takes its share."""
        x = logits if logits.dtype == torch.float64 else logits.float()
        if self.sink_logits is not None:
            sink = self.sink_logits.to(x.dtype)[:, None, None].expand(*x.shape[:3], 1)
            x = torch.cat([x, sink], dim=-1)
        x = x.softmax(-1)[..., : logits.shape[-1]]
        return x.masked_fill(logits == -torch.inf, 0.0).to(logits.dtype)

    def mix(self, weights: Float[Tensor, "b hq r m"]) -> Float[Tensor, "b hq r e"]:
        """Weights times values: what each head puts out."""
        groups = weights.shape[1] // self.value.shape[1]
        return (weights.unflatten(1, (-1, groups)) @ self.value[:, :, None]).flatten(1, 2)


def layer_of(module: nn.Module, name: str) -> int:
    """The layer of an attention module: its layer_idx, else the first number in its name, else 0."""
    index = getattr(module, "layer_idx", None)
    if index is None:
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        index = int(found[1]) if found else 0
    return int(index)


def crosses(module: nn.Module, name: str) -> bool:
    """Whether an attention module looks at another sequence, by what it says or is called."""
    told = getattr(module, "is_cross_attention", None)
    return bool(told) if told is not None else any(w in name for w in ("encoder_attn", "cross", "EncDec"))
