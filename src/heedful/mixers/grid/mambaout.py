"""MambaOut's gated CNN block: a Mamba block whose scan is left out."""

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
    "mambaout",
    kind="grid",
    paper="mambaout",
    tags=("convolution", "gate"),
    aliases=("gated-cnn",),
    spatial=(2,),
    complexity="O(N C (C + k^2))",
)
class GatedCNN(Mixer):
    """A gate times channels of which some are convolved: the mixer and the MLP of a block in one.

        g, i, c = W1 LN(x),   y = W2 (gelu(g) * [i, DWConv(c)])

    The norm is inside; the residual around it is that of the block. With conv_ratio 0 no tokens are mixed.

    dim         channels
    expansion   hidden channels are int(expansion dim); g has as many, i and c together too
    kernel      side of the depthwise convolution, odd
    conv_ratio  c has int(conv_ratio dim) channels, at most the hidden ones

    Raises ValueError on an even kernel, or a conv_ratio that is negative or too large.
    Source: MambaOut, arXiv 2405.07992.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 12}

    def __init__(
        self,
        dim: int,
        *,
        expansion: float = 8 / 3,
        kernel: int = 7,
        conv_ratio: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("kernel", kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}, must be odd")
        hidden, conv = int(expansion * dim), int(conv_ratio * dim)
        if not 0 <= conv <= hidden:
            raise ValueError(f"conv_ratio is {conv_ratio}, must be at least 0 and at most expansion")
        self.split = (hidden, hidden - conv, conv)
        self.norm = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.fc1 = nn.Linear(dim, 2 * hidden, device=device, dtype=dtype)
        self.conv = (
            nn.Conv2d(conv, conv, kernel, padding=kernel // 2, groups=conv, device=device, dtype=dtype)
            if conv
            else nn.Identity()
        )
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        return self.mix(x.movedim(1, -1)).movedim(-1, 1)

    def mix(self, x: Float[Tensor, "b height width c"]) -> Float[Tensor, "b height width c"]:
        """The mechanism on a map whose channels come last."""
        gate, same, conv = self.fc1(self.norm(x)).split(self.split, dim=-1)  # 1, 2
        conv = self.conv(conv.movedim(-1, 1)).movedim(1, -1)  # 3
        return self.fc2(F.gelu(gate) * torch.cat([same, conv], dim=-1))  # 4
