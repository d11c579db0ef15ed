"""SnapKV for the prompt and a rolling window for what is generated: bounded memory for both."""

from __future__ import annotations

from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from heedful.cache.layer import PolicyCache
from heedful.cache.rerotate import Rotation, rotation_of
from heedful.cache.snapkv import SnapKVLayer, check_snapkv
from heedful.checks import check_choice, check_positive
from heedful.hf.attention import Visibility
from heedful.registry import register


@register("snapkv-streaming", kind="cache", paper="snapkv", tags=("cache", "eviction", "window"))
class SnapKVStreamingCache(PolicyCache):
    """A cache of `capacity` entries of the prompt and the last `recent` tokens after it.

    The prompt is shrunk once as in `SnapKVCache`. Of the tokens after it the last `recent` stay; the prompt's
    entries are turned forward by the number of tokens dropped behind them, as sinks are in `StreamingCache`,
    so that distances never grow beyond prompt + recent. While nothing had to be dropped it is a full cache.

    recent  tokens kept after the prompt, at least 1; all else as in `SnapKVCache`

    Raises ValueError as `SnapKVCache` does, and without rotary positions. Sources: SnapKV, arXiv 2404.14469;
    StreamingLLM, arXiv 2309.17453.
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        *,
        recent: int = 1024,
        window: int = 32,
        capacity: int = 1024,
        kernel: int = 5,
        pooling: str = "avg",
        group_reduce: str = "mean",
    ) -> None:
        check_positive("recent", recent)
        check_choice("group_reduce", group_reduce, ("mean", "max"))
        told: dict[str, Any] = {"window": window, "capacity": capacity, "kernel": kernel, "pooling": pooling}
        check_snapkv(**told)
        rotation = rotation_of(model)
        super().__init__(
            model, lambda _: SnapKVStreamingLayer(recent, rotation, **told, group_reduce=group_reduce)
        )

    @classmethod
    def of_budget(cls, model: PreTrainedModel | PreTrainedConfig, budget: int) -> Self:
        """Half of `budget` for the prompt and half for what follows; up to 32 of it are the window."""
        if budget < 4:
            raise ValueError(
                f"budget is {budget}, must be at least 4: a prompt's window and choice, and recent tokens"
            )
        capacity = budget // 2
        return cls(model, recent=budget - capacity, window=min(32, capacity // 2), capacity=capacity)


class SnapKVStreamingLayer(SnapKVLayer):
    """One layer of a `SnapKVStreamingCache`.

    prompt   entries of the prompt; 0 before it
    dropped  (b,) tokens dropped behind the prompt
    """

    rows = (*SnapKVLayer.rows, "dropped")

    def __init__(self, recent: int, rotation: Rotation, **told: Any) -> None:
        super().__init__(**told)
        self.recent, self.rotation = recent, rotation
        self.prompt = 0
        self.dropped: Tensor | None = None

    def read(self) -> tuple[Float[Tensor, "b hkv m d"], Float[Tensor, "b hkv m e"]]:
        if self.dropped is None:
            return self.keys, self.values
        prompt = self.rotation.shift(
            self.keys[:, :, : self.prompt], self.dropped[:, None].expand(-1, self.prompt)
        )
        return torch.cat([prompt, self.keys[:, :, self.prompt :]], dim=2), self.values

    def retain(self, query: Tensor | None, scale: float, told: Visibility | None) -> None:
        super().retain(query, scale, told)
        held = self.held()
        if self.prompt == 0:
            self.prompt = held
        old = held - self.recent  # before the recent tokens
        if old <= self.prompt:
            return
        batch, device = self.keys.shape[0], self.keys.device
        gone = torch.full((batch,), old - self.prompt, device=device)
        if self.valid is not None:
            valid = self.valid if self.valid.ndim == 2 else self.valid[:, 0]
            gone = valid[:, self.prompt : old].sum(1)
        self.dropped = gone if self.dropped is None else self.dropped + gone
        places = torch.arange(held, device=device)
        self.keep(torch.cat([places[: self.prompt], places[old:]]).expand(batch, -1))

    def reset(self) -> None:
        super().reset()
        self.prompt, self.dropped = 0, None
