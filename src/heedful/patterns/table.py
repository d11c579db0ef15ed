"""Lookup tables of patterns."""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor


class Table:
    """Values by position, with a copy on every device that asked.

    The copies are kept by the pattern, not made anew, because a compiler that traces `visible` must find
    a tensor that exists already: call `visible` once on a device before compiling for it (not on a CPU).
    """

    def __init__(self, values: Shaped[Tensor, "..."]) -> None:
        self._copies = {values.device: values}
        self._source = values

    def on(self, device: torch.device) -> Shaped[Tensor, "..."]:
        if device not in self._copies:
            self._copies[device] = self._source.to(device)
        return self._copies[device]
