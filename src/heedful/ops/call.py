"""One call of `heedful.attention`, checked, as every backend receives it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.kept import kept
from heedful.ops.bias import FactoredBias
from heedful.patterns.pattern import Pattern
from heedful.selection import BlockTable, TokenGroups

Selection = Pattern | BlockTable | TokenGroups


@dataclass(frozen=True)
class Call:
    """query (b, hq, n, d), key (b, hkv, m, d), value (b, hkv, m, e); the rest as in `heedful.attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    selection: Selection | None
    bias: Tensor | FactoredBias | None
    scale: float
    key_mask: Tensor | None
    sink_logits: Tensor | None
    query_offset: int
    dropout_p: float
    return_lse: bool

    @property
    def n(self) -> int:
        return self.query.shape[2]

    @property
    def m(self) -> int:
        return self.key.shape[2]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def repeats(self) -> int:
        """How many consecutive query heads share a KV head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def scores(self) -> int:
        """How many logits a dense computation holds."""
        return self.query.shape[0] * self.heads * self.n * self.m

    def mask(self) -> Tensor | None:
        """The dense mask of pattern, table and key mask, (b|1, h|1, n, m); None: all is visible."""
        seen: Tensor | None = None
        if isinstance(self.selection, Pattern):
            seen = _dense_mask(self.selection, self.n, self.m, self.query_offset, self.query.device)
        elif self.selection is not None:
            seen = self.selection.dense()
        if self.key_mask is not None:
            keys = self.key_mask[:, None, None, :]
            seen = keys if seen is None else seen & keys
        return seen

    def widened(self) -> Call:
        """The same call with a factored bias moved into query and key: softmax([s q, Qb] [k, Kb]^T) v."""
        if not isinstance(self.bias, FactoredBias):
            return self
        # Positions do not fit into half precision, so half inputs are widened in float32.
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        query_factor, key_factor = self.bias.for_heads(self.heads)
        if self.repeats > 1 and key_factor.shape[1] > 1:
            raise ValueError(
                f"bias has key factors for {key_factor.shape[1]} heads, must be for one "
                "where query heads share a KV head; move what differs by head into the query factor"
            )
        query = _join(self.query.to(dtype) * self.scale, query_factor.to(dtype))
        key = _join(self.key.to(dtype), key_factor.to(dtype))
        return replace(self, query=query, key=key, value=self.value.to(dtype), bias=None, scale=1.0)


def _join(x: Tensor, factor: Tensor) -> Tensor:
    joined = torch.cat([x, factor.expand(*x.shape[:3], -1)], dim=-1)
    return F.pad(joined, (0, -joined.shape[-1] % 8))  # widths that are multiples of 8 suit fused kernels


@kept(32)
def _small_dense_mask(pattern: Pattern, n: int, m: int, offset: int, device: torch.device) -> Tensor:
    return pattern.mask(n, m, query_offset=offset, device=device)


def _dense_mask(pattern: Pattern, n: int, m: int, offset: int, device: torch.device) -> Tensor:
    if n * m > 1 << 20 or torch.compiler.is_compiling():
        return pattern.mask(n, m, query_offset=offset, device=device)
    return _small_dense_mask(pattern, n, m, offset, device)
