"""One matrix that mixes the tokens of a map, the same for every channel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.registry import register


@register(
    "spatial-fc",
    kind="grid",
    paper="metaformer-poolformer",
    tags=("dense", "static"),
    aliases=("spatial-mlp",),
    spatial=(2,),
    complexity="O(N^2 C)",
)
class SpatialFC(Mixer):
    """A learned matrix over the tokens of a map of one size, without a bias.

        y[c, i] = sum_j W[i, j] x[c, j],   i, j over size[0] size[1] tokens, row by row

    A map of another size is interpolated (bilinear) to `size`, mixed, and interpolated back: heedful's
    extension, the published module takes one size alone.

    dim   channels
    size  height and width of the map that W is for

    Raises ValueError on a side below 1. Source: MetaFormer Is Actually What You Need, arXiv 2111.11418.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "size": (4, 5)}

    def __init__(
        self,
        dim: int,
        *,
        size: tuple[int, int] = (7, 7),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        for side in size:
            check_positive("size", side)
        self.size = tuple(size)
        self.fc = nn.Linear(size[0] * size[1], size[0] * size[1], bias=False, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        return _resize(self.fc(_resize(x, self.size).flatten(2)).unflatten(2, self.size), x.shape[2:])


def _resize(x: Float[Tensor, "b c height width"], size: tuple[int, ...]) -> Tensor:
    if x.shape[2:] == size:
        return x
    if x.shape[0] == 0:
        return x.new_empty(*x.shape[:2], *size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
