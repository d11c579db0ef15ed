"""The local concentration module of L2ViT: two wide depthwise convolutions behind linear attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map
from heedful.mixers.mixer import Mixer
from heedful.registry import register


@register(
    "local-concentration",
    kind="grid",
    paper="l2vit",
    tags=("convolution",),
    aliases=("lcm",),
    spatial=(2,),
    complexity="O(49 N C)",
)
class LocalConcentration(Mixer):
    """Mixing within 13 x 13 tokens, which makes the even output of linear attention local again.

        y = DWConv7x7(BatchNorm(gelu(DWConv7x7(x))))

    dim  channels

    Raises ValueError if x is no map of dim channels. Source: L2ViT, arXiv 2501.16182.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16}

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        self.conv1 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        return self.conv2(self.bn(F.gelu(self.conv1(x))))
