"""The contract of an image backbone: what every model for images declares and accepts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map, check_positive
from heedful.registry import Entry


class Backbone(nn.Module, ABC):
    """An image in, logits or a pyramid of maps out.

    A model calls `super().__init__`, builds its stages, and sets `channels` and `reductions`: one entry for
    each map that `features` gives, its width and how many pixels of the image one of its pixels spans along a
    side. What follows the last map (norms, `self.head = head(width, classes)`) it builds only if
    `features_only` is False.

    classes        outputs of the head; 0: no head, the pooled vector comes out
    in_channels    channels of the image
    features_only  forward gives the maps of `features`, and nothing behind them is built
    """

    entry: ClassVar[Entry]
    example: ClassVar[dict[str, Any]]  # a small instance: cls(**example)
    example_size: ClassVar[tuple[int, int]] = (64, 64)  # an image it takes
    exempt: ClassVar[dict[str, str]] = {}  # checks that cannot hold -> why
    channels: tuple[int, ...]
    reductions: tuple[int, ...]
    head: nn.Module

    def __init__(self, *, classes: int, in_channels: int, features_only: bool) -> None:
        super().__init__()
        if not isinstance(classes, int) or classes < 0:
            raise ValueError(f"classes is {classes!r}, must be a whole number of at least 0")
        check_positive("in_channels", in_channels)
        self.classes = classes
        self.in_channels = in_channels
        self.features_only = features_only

    @property
    def width(self) -> int:
        """Of the vector that the head sees; a model with layers between the last map and it says so."""
        return self.channels[-1]

    @abstractmethod
    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        """The map after each stage, finest first."""

    def pool(self, last: Float[Tensor, "b e height width"]) -> Float[Tensor, "b e"]:
        """What the head sees of the last map: its mean; a model with norms here says so."""
        return last.mean((2, 3))

    def pooled(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e"]:
        """The vector that the head sees."""
        return self.pool(self.features(x)[-1])

    def forward(self, x: Float[Tensor, "b c height width"]) -> Tensor | list[Tensor]:
        check_map("x", x, self.in_channels, (2,))
        return self.features(x) if self.features_only else self.head(self.pooled(x))

    def reset_classifier(self, classes: int) -> None:
        """A fresh head with this many outputs, 0 for none; the rest stays."""
        if self.features_only:
            raise ValueError("features_only is True, must be False for a model to have a head")
        like = next(self.parameters())
        self.head = head(self.width, classes).to(like.device, like.dtype)
        self.classes = classes

    def example_inputs(
        self, *, batch: int = 2, size: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, self.in_channels, *(size or self.example_size))
        return {"x": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)}


def head(width: int, classes: int) -> nn.Module:
    """A linear classifier, or nothing for 0 classes."""
    return nn.Linear(width, classes) if classes else nn.Identity()
