"""FreeSwim's self-attention: windows of the training size in space, over all frames of a larger video."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_positive
from heedful.mixers.grid.map_attention import MapAttention
from heedful.ops.attention import attention
from heedful.patterns.inward_window import InwardWindow
from heedful.registry import register

_TOKENS = 30 * 52  # of a training frame, 480 x 832 pixels; the authors keep it for other models too


@register(
    "freeswim",
    kind="grid",
    paper="freeswim",
    tags=("sparse", "local", "window", "video"),
    spatial=(3,),
    complexity="O(N T W C), T frames, W tokens of a window",
)
class InwardWindowAttention(MapAttention):
    """Softmax attention over a window as large as a training frame, moved inward at borders, in all frames.

        y_i = W sum_j softmax_j(s q_i . k_j) v_j,  s = sqrt(log_1560(2 * 1560) / d)

    with the windows of `heedful.patterns.inward_window.InwardWindow`: 2 floor(side / 2) + 1 tokens for each
    side of `native`. A video no larger than that is attended to whole.

    dim       channels
    heads     divides dim
    native    (height, width) of a training frame in tokens: pixels / 16; (30, 52) for 480 x 832
    qkv_bias  whether the projection of queries, keys and values has a bias
    The base 1560 = 30 * 52 stays what it is for every `native`, as published.

    Raises ValueError if heads does not divide dim or native is not two positive sides.
    Source: FreeSwim, arXiv 2511.14712.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "native": (2, 3)}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        native: tuple[int, int] = (30, 52),
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads=heads, qkv_bias=qkv_bias, device=device, dtype=dtype)
        if len(native) != 2:
            raise ValueError(f"native is {native}, must be (height, width)")
        for name, side in zip(("native[0]", "native[1]"), native, strict=True):
            check_positive(name, side)
        self.native = native
        self.scale = math.sqrt(math.log(2 * _TOKENS, _TOKENS) / (dim // heads))

    def pattern(self, size: tuple[int, ...]) -> InwardWindow:
        """Who sees whom in a video of this size, (frames, height, width)."""
        return InwardWindow(size, tuple(side // 2 for side in self.native))

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n d"],
        size: tuple[int, ...],
    ) -> Float[Tensor, "b h n d"]:
        return attention(query, key, value, pattern=self.pattern(size), scale=self.scale)
