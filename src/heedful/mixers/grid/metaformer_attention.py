"""Dense attention of all tokens of a map: the attention stages of MetaFormer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_divides
from heedful.mixers.grid.map_attention import MapAttention
from heedful.ops.attention import attention
from heedful.registry import register


@register(
    "metaformer-attention",
    kind="grid",
    paper="metaformer-poolformer",
    tags=("dense",),
    spatial=(1, 2, 3),
    complexity="O(N^2 C)",
)
class MetaFormerAttention(MapAttention):
    """Multi-head attention of all tokens of a map, heads of one width.

        y = W_o softmax(q k^T / sqrt(head_dim)) v + b,   q, k, v = W x

    dim       channels
    head_dim  width of a head, divides dim
    qkv_bias  whether the projection of q, k and v has a bias

    Raises ValueError if head_dim does not divide dim.
    Source: MetaFormer Is Actually What You Need, arXiv 2111.11418 (there on images).
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "head_dim": 4}

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        qkv_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_divides("head_dim", head_dim, "dim", dim)
        super().__init__(dim, heads=dim // head_dim, qkv_bias=qkv_bias, device=device, dtype=dtype)

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n d"],
        size: tuple[int, ...],
    ) -> Float[Tensor, "b h n d"]:
        return attention(query, key, value)
