"""Attention sinks: the first tokens and a rolling window, with positions counted inside the cache."""

from __future__ import annotations

from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from heedful.cache.layer import PolicyCache, PolicyLayer
from heedful.cache.rerotate import Rotation, rotation_of
from heedful.checks import check_positive
from heedful.hf.attention import Visibility
from heedful.registry import register


@register("streaming-cache", kind="cache", paper="streaming-llm", tags=("cache", "sink", "window"))
class StreamingCache(PolicyCache):
    """A cache of the first `sinks` tokens and the last `window` tokens.

        before each call  cache = tokens [0, sinks) and [L - window, L)

    Positions are those in the cache: the sinks stand just before the window. The model's own position ids go
    on growing, so it is the sinks that are turned forward, by the number of tokens dropped behind them; only
    distances matter to rotary positions. Tokens of one call see each other and the whole cache; what is too
    much is dropped after the call. While nothing had to be dropped the cache is a full one. Padding takes no
    sink.

    model    a model with rotary positions, or its configuration (with sinks=0 any positions)
    sinks    first tokens kept
    window   last tokens kept, at least 1

        model.generate(ids, past_key_values=StreamingCache(model, sinks=4, window=1020))

    Batches of several sequences need model.set_attn_implementation("heedful"), so that the cache knows their
    padding. Raises ValueError without rotary positions, and on a negative number of sinks or an empty
    window. Source: StreamingLLM, arXiv 2309.17453.
    """

    def __init__(
        self, model: PreTrainedModel | PreTrainedConfig, *, sinks: int = 4, window: int = 1020
    ) -> None:
        if not isinstance(sinks, int) or sinks < 0:
            raise ValueError(f"sinks is {sinks!r}, must be a whole number of at least 0")
        check_positive("window", window)
        rotation = rotation_of(model) if sinks else None
        super().__init__(model, lambda _: StreamingLayer(sinks, window, rotation))

    def make_room(self, coming: int) -> None:
        """Drop so many tokens of the window now that `coming` more will fit into it."""
        check_positive("coming", coming)
        for layer in self.layers:
            if isinstance(layer, StreamingLayer):
                layer.make_room(coming)

    @classmethod
    def of_budget(cls, model: PreTrainedModel | PreTrainedConfig, budget: int) -> Self:
        """A cache of `budget` tokens, 4 of them sinks."""
        if budget < 5:
            raise ValueError(f"budget is {budget}, must be at least 5: 4 sinks and a window")
        return cls(model, sinks=4, window=budget - 4)


class StreamingLayer(PolicyLayer):
    """One layer of a `StreamingCache`; `dropped` (b,) counts the tokens dropped behind the sinks."""

    rows = (*PolicyLayer.rows, "dropped")

    def __init__(self, sinks: int, window: int, rotation: Rotation | None) -> None:
        super().__init__()
        self.sinks, self.window, self.rotation = sinks, window, rotation
        self.dropped: Tensor | None = None

    def read(self) -> tuple[Float[Tensor, "b hkv m d"], Float[Tensor, "b hkv m e"]]:
        if self.dropped is None or self.rotation is None:
            return self.keys, self.values
        sinks = self.rotation.shift(
            self.keys[:, :, : self.sinks], self.dropped[:, None].expand(-1, self.sinks)
        )
        return torch.cat([sinks, self.keys[:, :, self.sinks :]], dim=2), self.values

    def retain(self, query: Tensor | None, scale: float, told: Visibility | None) -> None:
        self.shrink(self.window)

    def make_room(self, coming: int) -> None:
        """See `StreamingCache`."""
        self.settle()
        if self.held() + coming > self.sinks + self.window:
            self.shrink(max(0, self.window - coming))

    def shrink(self, window: int) -> None:
        """Keep the sinks and the last `window` tokens."""
        old = self.held() - window  # tokens before the window
        if old <= self.sinks:
            return
        batch, device = self.keys.shape[0], self.keys.device
        valid = torch.ones(batch, old, dtype=torch.bool, device=device)
        if self.valid is not None:
            valid = self.valid[:, :old]
        first = valid.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : self.sinks]
        kept = valid.gather(1, first).sum(1)
        dropped = valid.sum(1) - kept
        self.dropped = dropped if self.dropped is None else self.dropped + dropped
        last = torch.arange(old, self.held(), device=device).expand(batch, -1)
        self.keep(torch.cat([first, last], dim=1))
        if self.valid is not None:
            self.valid = self.valid[:, 0]  # all heads keep the same tokens

    def reset(self) -> None:
        super().reset()
        self.dropped = None
