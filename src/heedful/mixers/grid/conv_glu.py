"""A gated feed-forward net of maps whose gate sees its neighbours."""

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
    "conv-glu",
    kind="grid",
    paper="transnext",
    tags=("gate", "convolution", "local"),
    aliases=("convolutional-glu",),
    spatial=(2,),
    complexity="O(N hidden C)",
)
class ConvGLU(Mixer):
    """A feed-forward net in which a depthwise convolution of one half gates the other.

        (a, v) = W_1 x + b_1,   y = W_2 (gelu(DWConv3x3(a)) v) + b_2

    dim     channels
    hidden  width of an ordinary net of as many parameters; a and v have 2/3 of it, rounded down.
            None: 4 dim

    Raises ValueError if hidden is less than 2. Source: TransNeXt, arXiv 2311.17132.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 12, "hidden": 18}

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        hidden = 4 * dim if hidden is None else hidden
        check_positive("hidden", hidden)
        inner = 2 * hidden // 3
        if not inner:
            raise ValueError(f"hidden is {hidden}, must be at least 2")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, 2 * inner, **factory)
        self.dwconv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, **factory)
        self.fc2 = nn.Linear(inner, dim, **factory)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, (2,))
        gate, value = self.fc1(x.movedim(1, -1)).chunk(2, dim=-1)
        gate = self.dwconv(gate.movedim(-1, 1)).movedim(1, -1)
        return self.fc2(F.gelu(gate) * value).movedim(-1, 1)
