"""PoolFormer's mixer: the mean of the neighbourhood minus the point itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.registry import register


@register(
    "metaformer-poolformer",
    kind="grid",
    paper="metaformer-poolformer",
    tags=("pooling", "parameter-free"),
    aliases=("poolformer", "pool"),
    spatial=(1, 2, 3),
    complexity="O(N C)",
)
class PoolMixer(Mixer):
    """Average pooling as token mixer.

        y = mean of x over the pool^s neighbourhood that lies inside the map - x

    The minus takes out the copy that the residual connection around the mixer adds. No parameters.

    dim   channels
    pool  side of the neighbourhood, odd

    `device` and `dtype` are accepted as in every mixer and have nothing to act on.
    Raises ValueError if `pool` is even or below 1.
    Source: MetaFormer Is Actually What You Need for Vision, arXiv 2111.11418 (there on images).
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16}

    def __init__(
        self,
        dim: int,
        *,
        pool: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("pool", pool)
        if pool % 2 == 0:
            raise ValueError(f"pool is {pool}, must be odd")
        self.pool = pool

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        check_map("x", x, self.dim, self.entry.spatial)
        if x.ndim == 5:
            # The mean is separable, and unlike this pair avg_pool3d refuses maps smaller than its window.
            frames = self._average(x.flatten(1, 2), (self.pool, self.pool)).view(x.shape)
            return self._average(frames.flatten(3), (self.pool, 1)).view(x.shape) - x
        if x.ndim == 3:
            return self._average(x[..., None], (self.pool, 1))[..., 0] - x
        return self._average(x, (self.pool, self.pool)) - x

    def _average(self, x: Float[Tensor, "b c height width"], window: tuple[int, int]) -> Tensor:
        padding = (window[0] // 2, window[1] // 2)
        return F.avg_pool2d(x, window, stride=1, padding=padding, count_include_pad=False)
