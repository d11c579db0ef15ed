"""Sparse query attention: fewer query heads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from heedful.checks import check_divides
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.patterns.pattern import Pattern
from heedful.registry import register


@register(
    "sqa",
    kind="sequence",
    paper="sqa",
    tags=("heads", "softmax"),
    aliases=("sparse-query-attention",),
    causal="optional",
    cross=True,
    decode=True,
    complexity="O(N^2 C query_heads / heads)",
)
class SparseQueryAttention(SelfAttention):
    """Grouped-query attention whose number of query heads is lowered, which makes all of it cheaper.

        d = dim / heads,  y = concat_h(softmax(q_h k_g^T / sqrt(d)) v_g) W_o,  h < query_heads

    `heads` fixes the width d of a head alone; scores and weighted sums cost query_heads / heads of
    multi-head attention's 4 N^2 C. W_o maps query_heads * d channels back to `dim`.

    heads        heads of the multi-head attention that this one stands for
    query_heads  query heads, a divisor of `heads`; None: heads / 2. heads / 4 is the paper's extreme variant
    kv_heads     key and value heads, a divisor of `query_heads`; None: half of the query heads, at least 1.
                 As many as query heads: the symmetric variant
    rotary       rotary position embedding on queries and keys, neighbouring channels paired
    causal, pattern, qkv_bias, dropout and the arguments of forward are those of `SelfAttention`.

    Raises ValueError if the numbers of heads do not divide each other.
    Source: Sparse Query Attention, arXiv 2510.01817.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 8, "query_heads": 4, "kv_heads": 2}
    pairing: ClassVar[str] = "interleaved"

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        query_heads: int | None = None,
        kv_heads: int | None = None,
        causal: bool = False,
        rotary: bool = False,
        pattern: Pattern | None = None,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        query_heads = max(1, heads // 2) if query_heads is None else query_heads
        kv_heads = max(1, query_heads // 2) if kv_heads is None else kv_heads
        check_divides("heads", heads, "dim", dim)
        check_divides("query_heads", query_heads, "heads", heads)
        check_divides("kv_heads", kv_heads, "query_heads", query_heads)
        super().__init__(
            dim,
            heads=query_heads,
            kv_heads=kv_heads,
            head_dim=dim // heads,
            causal=causal,
            rotary=rotary,
            pattern=pattern,
            qkv_bias=qkv_bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
