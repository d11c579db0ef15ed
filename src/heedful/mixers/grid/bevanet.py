"""Large kernels as thin strips: in sequence (LSKA), or side by side and weighed by what they see (SDLSKA)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_choice, check_map
from heedful.mixers.mixer import Mixer
from heedful.registry import register

# kernel: (side of the near convolution, length of the far strips, their dilation)
STRIPS = {
    7: (3, 3, 2),
    11: (3, 5, 2),
    23: (5, 7, 3),
    35: (5, 11, 3),
    41: (5, 13, 3),
    53: (5, 17, 3),
}


@register(
    "lska",
    kind="grid",
    paper="bevanet",
    tags=("conv", "gate", "segmentation"),
    aliases=("large-separable-kernel-attention",),
    spatial=(2,),
    complexity="O(N C (2 near + 2 far + C))",
)
class LargeSeparableKernelAttention(Mixer):
    """The input times a map made by four strips in sequence.

        y = x * Conv1x1(far column(far row(near column(near row(x)))))

    dim     channels
    kernel  reach of the strips: 7, 11, 23, 35, 41 or 53

    ValueError on another kernel. Source: BEVANet, arXiv 2508.07300.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "kernel": 11}

    def __init__(
        self,
        dim: int,
        *,
        kernel: int = 35,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_choice("kernel", kernel, [*STRIPS])
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        near, far, dilation = STRIPS[kernel]
        self.near_row = _depthwise(dim, (1, near), **where)
        self.near_column = _depthwise(dim, (near, 1), **where)
        self.far_row = _depthwise(dim, (1, far), dilation, **where)
        self.far_column = _depthwise(dim, (far, 1), dilation, **where)
        self.mix = nn.Conv2d(dim, dim, 1, **where)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        near = self.near_column(self.near_row(x))
        return x * self.mix(self.far_column(self.far_row(near)))


class ComprehensiveKernelSelection(nn.Module):
    """Three maps joined, each weighed channel by channel and pixel by pixel.

        t = s + h + v,   r = relu(BN(DWConv3x3(W mean(t))))
        channels_m = sigmoid(relu(BN(DWConv3x3(W_m r)))),   places = sigmoid(conv7x7([mean_c t, max_c t]))
        out = s channels_s places_s + h channels_h places_h + v channels_v places_v

    Behind the relu no channel weighs less than a half. Of the 3 x 3 convolutions on a single pixel only the
    middle counts, as published. In training the batch norms need more than one image.
    """

    def __init__(self, dim: int, **where: Any) -> None:
        super().__init__()
        hidden = max(dim // 16, 32)
        self.reduce = _squeeze(dim, hidden, **where)
        self.expand = nn.ModuleList(_squeeze(hidden, dim, **where) for _ in range(3))
        self.places = nn.Conv2d(2, 3, 7, padding=3, **where)

    def forward(self, *maps: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        total = maps[0] + maps[1] + maps[2]
        reduced = self.reduce(total.mean((2, 3), keepdim=True))
        seen = torch.cat([total.mean(1, keepdim=True), total.amax(1, keepdim=True)], dim=1)
        places = self.places(seen).sigmoid().split(1, dim=1)
        parts = [
            m * expand(reduced).sigmoid() * place
            for m, expand, place in zip(maps, self.expand, places, strict=True)
        ]
        return parts[0] + parts[1] + parts[2]


@register(
    "sdlska",
    kind="grid",
    paper="bevanet",
    tags=("conv", "gate", "segmentation"),
    aliases=("sparse-decomposed-large-separable-kernel-attention",),
    spatial=(2,),
    complexity="O(N C (near^2 + 2 far + C))",
)
class SparseDecomposedLargeSeparableKernelAttention(Mixer):
    """The input times a map in which a near convolution and two far strips each have their share.

        s = DWConv_near(x),   h = far row(s),   v = far column(s)
        y = x * Conv1x1(select(s, h, v))                                see `ComprehensiveKernelSelection`

    dim     channels
    kernel  reach of the strips: 7, 11, 23 or 35

    In training the selection's batch norms need more than one image. ValueError on another kernel.
    Source: BEVANet, arXiv 2508.07300.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "kernel": 11}

    def __init__(
        self,
        dim: int,
        *,
        kernel: int = 35,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_choice("kernel", kernel, [7, 11, 23, 35])
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        near, far, dilation = STRIPS[kernel]
        self.near = _depthwise(dim, (near, near), **where)
        self.row = _depthwise(dim, (1, far), dilation, **where)
        self.column = _depthwise(dim, (far, 1), dilation, **where)
        self.select = ComprehensiveKernelSelection(dim, **where)
        self.mix = nn.Conv2d(dim, dim, 1, **where)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        near = self.near(x)
        return x * self.mix(self.select(near, self.row(near), self.column(near)))


def _depthwise(dim: int, kernel: tuple[int, int], dilation: int = 1, **where: Any) -> nn.Conv2d:
    padding = (dilation * (kernel[0] // 2), dilation * (kernel[1] // 2))
    return nn.Conv2d(dim, dim, kernel, padding=padding, dilation=dilation, groups=dim, **where)


def _squeeze(dim: int, out: int, **where: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, out, 1, **where),
        nn.Conv2d(out, out, 3, padding=1, groups=out, **where),
        nn.BatchNorm2d(out, **where),
        nn.ReLU(),
    )
