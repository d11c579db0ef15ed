"""CoCa pool: a learned query in heads, over keys and values that all heads share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.mixers.mixer import Mixer
from heedful.mixers.pooling.token_attention import query_tokens, visible_tokens
from heedful.ops.attention import attention
from heedful.registry import register


@register(
    "coca-pool",
    kind="pool",
    paper="efficient-probing",
    tags=("pooling", "probe", "multi-query"),
    complexity="O(N C head_dim)",
)
class CoCaPool(Mixer):
    """Multi-query attention of one learned query over the tokens.

        q = Wq LN(query),  [k, v] = Wkv x             k, v: one head of head_dim channels
        y = Wo concat_h softmax(q_h k^T / sqrt(head_dim)) v

    No projection has a bias.

    dim       channels
    heads     attention heads
    head_dim  channels of each

    `mask` (b, n) hides tokens where it is False; a row without tokens gives zeros.
    Raises ValueError if heads or head_dim is below 1.
    Source: the comparison in Attention, Please! Revisiting Attentive Probing for Masked Image Modeling,
    arXiv 2506.10178.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 3, "head_dim": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("heads", heads)
        check_positive("head_dim", head_dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads = heads
        self.query_token = query_tokens(1, dim, **made)
        self.norm = nn.LayerNorm(dim, **made)
        self.q = nn.Linear(dim, heads * head_dim, bias=False, **made)
        self.kv = nn.Linear(dim, 2 * head_dim, bias=False, **made)
        self.proj = nn.Linear(heads * head_dim, dim, bias=False, **made)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        x = visible_tokens(x, self.dim, mask)
        query = self.q(self.norm(self.query_token)).expand(len(x), -1, -1)
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (t[:, None] for t in self.kv(x).chunk(2, -1))
        return self.proj(attention(query, key, value, key_mask=mask)[:, :, 0].flatten(1))
