"""Large kernel attention: a wide convolution, cut into three narrow ones, whose result gates the input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.registry import register


@register(
    "van-lka",
    kind="grid",
    paper="van-lka",
    tags=("convolution", "gate"),
    aliases=("lka", "large-kernel-attention"),
    spatial=(2,),
    complexity="O(N C ((2 d)^2 + (kernel / d)^2 + C)), d the dilation",
)
class LargeKernelAttention(Mixer):
    """The input times a map that convolutions of a wide reach make of it; no softmax.

        y = x * Conv1x1(DWConv_far(DWConv_near(x)))

    DWConv_near has side 2 dilation - 1, DWConv_far has side ceil(kernel / dilation) and the dilation; the
    borders are padded with zeros. At the default the sides are 5 and 7, and an output reads 23 x 23 tokens.

    dim       channels
    kernel    side of the convolution that the three stand for; ceil(kernel / dilation) is odd
    dilation  of the wide depthwise convolution

    Raises ValueError on a kernel that does not fit. Source: Visual Attention Network, arXiv 2202.09741.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16}

    def __init__(
        self,
        dim: int,
        *,
        kernel: int = 21,
        dilation: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("kernel", kernel)
        check_positive("dilation", dilation)
        near, far = 2 * dilation - 1, -(-kernel // dilation)
        if far % 2 == 0:
            raise ValueError(f"kernel is {kernel}, must make ceil(kernel / {dilation}) odd, not {far}")
        self.kernel = kernel
        self.dilation = dilation
        self.conv0 = nn.Conv2d(dim, dim, near, padding=near // 2, groups=dim, device=device, dtype=dtype)
        self.conv_spatial = nn.Conv2d(
            dim,
            dim,
            far,
            padding=far // 2 * dilation,
            dilation=dilation,
            groups=dim,
            device=device,
            dtype=dtype,
        )
        self.conv1 = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        return x * self.conv1(self.conv_spatial(self.conv0(x)))
