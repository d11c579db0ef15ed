"""A gate for each channel from the mean of all channels, a part of many mixers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """y = x sigmoid(W_2 act(W_1 mean(x))): one gate a channel of the image."""

    def __init__(
        self, dim: int, hidden: int, *, act: Callable[[], nn.Module] = nn.ReLU, **where: Any
    ) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1, **where)
        self.act = act()
        self.fc2 = nn.Conv2d(hidden, dim, 1, **where)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
