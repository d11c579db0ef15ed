"""HiDiffusion's window attention: four windows that share a map, moved at random from call to call."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_choice, check_map
from heedful.mixers.grid.map_attention import MapAttention
from heedful.ops.attention import attention
from heedful.patterns.quadrant_window import QuadrantWindow
from heedful.registry import register


@register(
    "hidiffusion",
    kind="grid",
    paper="hidiffusion",
    tags=("sparse", "window"),
    aliases=("msw-msa",),
    spatial=(2,),
    complexity="O(N^2 C / 4)",
    extra_inputs=("shift",),
)
class ModifiedShiftedWindowAttention(MapAttention):
    """Attention inside four windows of half the height and half the width of the map (MSW-MSA).

        y_i = W sum_j softmax_j(d^-0.5 q_i . k_j) v_j,  j in the window of i

    with the windows of `heedful.patterns.quadrant_window.QuadrantWindow`, moved by 0 to 3 quarters, a number
    that is drawn anew for every call. A map with an odd side is resized to even sides (bicubic) before the
    projection, and its output back.

    dim       channels
    heads     divides dim
    qkv_bias  whether the projection of queries, keys and values has a bias

    Raises ValueError if heads does not divide dim.
    Source: HiDiffusion, arXiv 2311.17528.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        qkv_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads=heads, qkv_bias=qkv_bias, device=device, dtype=dtype)

    def example_inputs(self, **how: Any) -> dict[str, Any]:
        return super().example_inputs(**how) | {"shift": 1}

    def forward(
        self, x: Float[Tensor, "b c height width"], *, shift: int | None = None
    ) -> Float[Tensor, "b c height width"]:
        """shift: quarters of a window by which the windows are moved, 0 to 3; None: `draw_shift()`."""
        check_map("x", x, self.dim, self.entry.spatial)
        shift = draw_shift() if shift is None else shift
        check_choice("shift", shift, (0, 1, 2, 3))
        size = (x.shape[2], x.shape[3])
        window = (-(-size[0] // 2), -(-size[1] // 2))
        even = (2 * window[0], 2 * window[1])
        if even != size:
            x = F.interpolate(x, even, mode="bicubic")
        down, right = QuadrantWindow(even, shift).moved
        x = x.roll((-down, -right), dims=(2, 3))
        x = rearrange(x, "b c (i h) (j w) -> (b i j) (h w) c", i=2, j=2)
        x = self.mix(x, window)
        x = rearrange(x, "(b i j) (h w) c -> b c (i h) (j w)", i=2, j=2, h=window[0])
        x = x.roll((down, right), dims=(2, 3))
        return F.interpolate(x, size, mode="bicubic") if even != size else x

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n d"],
        size: tuple[int, ...],
    ) -> Float[Tensor, "b h n d"]:
        return attention(query, key, value)  # a window is a batch row


def draw_shift(generator: torch.Generator | None = None) -> int:
    """How far the windows are moved in a call: 0 to 3 quarters, each as likely.

    generator: for reproducible draws; by default torch's own.
    Source: HiDiffusion, arXiv 2311.17528.
    """
    return shift_at(float(torch.rand(1, generator=generator)))


def shift_at(u: float) -> int:
    """The shift for a number drawn from [0, 1): 0 up to 0.25, 1 up to 0.5, 2 up to 0.75, else 3."""
    return (u > 0.25) + (u > 0.5) + (u > 0.75)


def feature_size(tokens: int, input_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a U-Net's feature map from its number of tokens and the size of the U-Net's input.

    r = round(sqrt(height * width / tokens)) of the input; its sides / r, rounded up.
    Raises ValueError if a map of that size does not hold `tokens` tokens.
    """
    height, width = input_size
    r = max(1, round(math.sqrt(height * width / tokens)))
    size = (-(-height // r), -(-width // r))
    if size[0] * size[1] != tokens:
        raise ValueError(
            f"tokens is {tokens}, must be {size[0]} x {size[1]} for an input of {height} x {width}"
        )
    return size
