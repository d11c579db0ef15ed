"""The largest activations of each layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from heedful.inspect.sample import Sample


@dataclass
class Peak:
    """The largest activation that enters a layer, over all samples."""

    layer: int
    token: str
    channel: int
    value: float
    median: float


class Peaks:
    """The largest activations entering each layer, by hooks on the blocks that hold the attention modules."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        modules = dict(model.named_modules())
        self.blocks: dict[int, nn.Module] = {}
        self.found: dict[int, Peak] = {}
        for name in names:
            match = re.match(r"(?:.*?\.)?(\d+)(?=\.)", name)
            if match:
                self.blocks[int(match[1])] = modules[match[0]]

    @contextmanager
    def of(self, sample: Sample) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, block in self.blocks.items():
                hook = partial(self._look, layer, sample)
                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _look(
        self, layer: int, sample: Sample, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[1] != len(sample):
            return
        size = hidden[0].float().abs()
        token, channel = divmod(int(size.argmax()), size.shape[1])
        peak = Peak(layer, sample.labels[token], channel, float(size.max()), float(size.median()))
        if layer not in self.found or peak.value > self.found[layer].value:
            self.found[layer] = peak

    def peaks(self) -> list[Peak]:
        return [self.found[layer] for layer in sorted(self.found)]
