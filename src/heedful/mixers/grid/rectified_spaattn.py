"""Rectified SpaAttn: block-sparse attention over a video that gives dropped blocks their share back."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_positive
from heedful.mixers.grid.map_attention import MapAttention
from heedful.registry import register
from heedful.routing.gilbert import block_neighbors, gilbert_order
from heedful.routing.rectified_blocks import rectified_attention


@register(
    "rectified-spaattn",
    kind="grid",
    paper="rectified-spaattn",
    tags=("sparse", "routing", "video", "block"),
    spatial=(3,),
    complexity="O(N K C + (N / B)^2 C), K tokens seen, B tokens of a block",
)
class RectifiedSparseAttention(MapAttention):
    """Block-sparse softmax attention along a Hilbert curve, rectified by the means of blocks.

        y_i = W (R_I sum_j softmax_j(d^-0.5 q_i . k_j) v_j + sum_J P_IJ mean_J(v)),  i in block I, j seen

    with blocks, R and P of `heedful.routing.rectified_blocks`: P_IJ is the attention of block I to a dropped
    block J, by the means of both, where that can be trusted, and R_I all the rest. Blocks that touch in the
    video always see each other. Selection passes no gradient; R, P and the means do.

    dim         channels
    heads       divides dim
    drop_rate   part of the blocks that may be dropped, e.g. 0.75 (Wan 2.1) or 0.8 (HunyuanVideo)
    p_remain    share of the block attention up to which blocks are seen in any case
    block_size  tokens of a block
    qkv_bias    whether the projection of queries, keys and values has a bias

    Raises ValueError if heads does not divide dim, drop_rate is not in [0, 1) or block_size not positive.
    Source: Rectified SpaAttn, arXiv 2511.19835; as released for Wan 2.1.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "block_size": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        drop_rate: float = 0.75,
        p_remain: float = 0.3,
        block_size: int = 128,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads=heads, qkv_bias=qkv_bias, device=device, dtype=dtype)
        check_positive("block_size", block_size)
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}, must lie in [0, 1)")
        self.drop_rate, self.p_remain, self.block_size = drop_rate, p_remain, block_size

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n d"],
        size: tuple[int, ...],
    ) -> Float[Tensor, "b h n d"]:
        order = gilbert_order(size).to(query.device)
        blocks = -(-query.shape[2] // self.block_size)
        y = rectified_attention(
            *(x[:, :, order] for x in (query, key, value)),
            block_size=self.block_size,
            top_k=max(1, int((1 - self.drop_rate) * blocks)),
            p_remain=self.p_remain,
            neighbors=block_neighbors(size, self.block_size).to(query.device),
            first_blocks=blocks // size[0],
        )
        return torch.empty_like(y).index_copy(2, order, y)
