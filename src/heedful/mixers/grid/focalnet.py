"""Focal modulation: gated context of growing reach, and of the whole map, multiplies each token."""

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
    "focalnet",
    kind="grid",
    paper="focalnet",
    tags=("convolution", "gate"),
    aliases=("focal-modulation",),
    spatial=(2,),
    complexity="O(N C (C + sum_l k_l^2))",
)
class FocalModulation(Mixer):
    """Each token times a mixture of contexts, weighted by a gate a token and a level; no attention matrix.

        q, c_0, g = W_f x,   c_l = gelu(DWConv_{k_l}(c_{l-1})),   k_l = window + factor (l - 1)
        y = W_o (q * W_h (sum_{l=1..levels} g_l c_l + g_{levels+1} gelu(mean(c_levels))))

    The gates have no activation. Borders are padded with zeros.

    dim                  channels
    levels               number of convolutions; 0 leaves the mean of the map alone
    window               side of the first convolution, odd
    factor               growth of the side a level, even
    normalize_modulator  divides the sum by levels + 1
    postln               LayerNorm between the product and W_o

    Raises ValueError on sides that are not odd. Source: Focal Modulation Networks, arXiv 2203.11926; the
    defaults are those of the models with the large receptive field (lrf).
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16}

    def __init__(
        self,
        dim: int,
        *,
        levels: int = 3,
        window: int = 3,
        factor: int = 2,
        normalize_modulator: bool = False,
        postln: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("window", window)
        for name, value in (("levels", levels), ("factor", factor)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}, must be a whole number of at least 0")
        if window % 2 == 0:
            raise ValueError(f"window is {window}, must be odd")
        if factor % 2:
            raise ValueError(f"factor is {factor}, must be even, so that every side is odd")
        self.levels = levels
        self.normalize_modulator = normalize_modulator
        self.f = nn.Linear(dim, 2 * dim + levels + 1, device=device, dtype=dtype)
        self.focal_layers = nn.ModuleList()
        for side in (window + factor * level for level in range(levels)):
            conv = nn.Conv2d(
                dim, dim, side, padding=side // 2, groups=dim, bias=False, device=device, dtype=dtype
            )
            self.focal_layers.append(nn.Sequential(conv, nn.GELU()))
        self.h = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)
        self.ln = nn.LayerNorm(dim, device=device, dtype=dtype) if postln else None
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        parts = self.f(x.movedim(1, -1)).movedim(-1, 1)  # 1
        q, context, gates = parts.split([self.dim, self.dim, self.levels + 1], dim=1)
        level_gates = gates.split(1, dim=1)
        total = torch.zeros_like(q)
        for layer, gate in zip(self.focal_layers, level_gates, strict=False):  # 2
            context = layer(context)
            total = total + context * gate
        total = total + F.gelu(context.mean((2, 3), keepdim=True)) * level_gates[-1]  # 3
        if self.normalize_modulator:
            total = total / (self.levels + 1)  # 4
        y = (q * self.h(total)).movedim(1, -1)  # 5
        if self.ln is not None:
            y = self.ln(y)
        return self.proj(y).movedim(-1, 1)
