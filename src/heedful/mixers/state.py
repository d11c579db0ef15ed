"""States: what a sequence mixer keeps of the past, so that x may continue a sequence."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class State:
    """Base of all states: `length` tokens were seen; every tensor field has the batch as its first axis."""

    length: int = 0

    def reorder(self, index: Int[Tensor, " b"]) -> Self:
        """The state whose batch row i is row `index[i]` of this one (beam search)."""
        chosen: dict[str, Any] = {
            f.name: value.index_select(0, index.to(value.device))
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **chosen)

    def nbytes(self) -> int:
        """Bytes held by the tensors of the state."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


@dataclass(frozen=True)
class KVState(State):
    """Keys and values of all tokens seen: (b, h, m, d); mask (b, m) once a padding mask was given."""

    key: Float[Tensor, "b h m d"] | None = None
    value: Float[Tensor, "b h m e"] | None = None
    mask: Bool[Tensor, "b m"] | None = None

    def append(
        self,
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n e"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> KVState:
        """The state after n more tokens."""
        batch, new = key.shape[0], key.shape[2]
        if mask is not None or self.mask is not None:
            old = self.mask if self.mask is not None else key.new_ones(batch, self.length, dtype=torch.bool)
            mask = torch.cat([old, mask if mask is not None else old.new_ones(batch, new)], dim=1)
        if self.key is not None and self.value is not None:
            key = torch.cat([self.key, key], dim=2)
            value = torch.cat([self.value, value], dim=2)
        return KVState(self.length + new, key, value, mask)
