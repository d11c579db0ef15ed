"""Radial attention: windows between the frames of a video that halve as the frames move apart."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_positive
from heedful.mixers.grid.map_attention import MapAttention
from heedful.ops.attention import attention
from heedful.patterns.radial import Radial
from heedful.registry import register


@register(
    "radial-attention",
    kind="grid",
    paper="radial-attention",
    tags=("sparse", "video", "block"),
    spatial=(3,),
    complexity="O(N log(N) C)",
)
class RadialAttention(MapAttention):
    """Softmax attention of a video's tokens over the blocks that `heedful.patterns.radial.Radial` shows.

        y_i = W sum_j softmax_j(d^-0.5 q_i . k_j) v_j,  j in a visible block

    A query sees its frame and the frames beside it; of others a band of places around its own, half as wide
    each time the distance of the frames doubles, and below 128 tokens fewer frames instead.

    dim         channels
    heads       divides dim
    decay       scale of the bands
    sink_frame  whether all tokens see the first frame
    block_size  tokens of a block; a frame, where frames are smaller
    qkv_bias    whether the projection of queries, keys and values has a bias
    The defaults are those for Wan 2.1; HunyuanVideo has decay 0.95 and no sink frame.

    Raises ValueError if heads does not divide dim, or decay or block_size is not positive.
    Source: Radial Attention, arXiv 2506.19852.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "block_size": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        decay: float = 0.2,
        sink_frame: bool = True,
        block_size: int = 128,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads=heads, qkv_bias=qkv_bias, device=device, dtype=dtype)
        check_positive("block_size", block_size)
        if decay <= 0:
            raise ValueError(f"decay is {decay}, must be positive")
        self.decay, self.sink_frame, self.block_size = decay, sink_frame, block_size

    def pattern(self, size: tuple[int, ...]) -> Radial:
        """Who sees whom in a video of this size, (frames, height, width)."""
        block = min(self.block_size, math.prod(size[1:]))
        return Radial(size, self.decay, block, self.sink_frame)

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n d"],
        size: tuple[int, ...],
    ) -> Float[Tensor, "b h n d"]:
        return attention(query, key, value, pattern=self.pattern(size))
