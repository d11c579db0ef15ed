"""V-JEPA pool: a transformer block whose only query is a learned token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_divides
from heedful.mixers.mixer import Mixer
from heedful.mixers.pooling.token_attention import FeedForward, attend, query_tokens, visible_tokens
from heedful.registry import register


@register(
    "vjepa-pool",
    kind="pool",
    paper="efficient-probing",
    tags=("pooling", "probe"),
    complexity="O(N C^2)",
)
class VJEPAPool(Mixer):
    """Cross-attention block of a learned query over normalised tokens, with a feed-forward of 4 dim.

        a = query + Wo softmax(q k^T / sqrt(dim / heads)) v + bo,   q = Wq query,  [k, v] = Wkv LN1(x)
        y = a + FFN(LN2(a))

    All projections have a bias; the query is not normalised before the attention.

    dim    channels
    heads  attention heads, divides dim

    `mask` (b, n) hides tokens where it is False.
    Raises ValueError if heads does not divide dim.
    Source: the comparison in Attention, Please! Revisiting Attentive Probing for Masked Image Modeling,
    arXiv 2506.10178.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_tokens = query_tokens(1, dim, **made)
        self.norm1 = nn.LayerNorm(dim, **made)
        self.q = nn.Linear(dim, dim, **made)
        self.kv = nn.Linear(dim, 2 * dim, **made)
        self.proj = nn.Linear(dim, dim, **made)
        self.norm2 = nn.LayerNorm(dim, **made)
        self.mlp = FeedForward(dim, **made)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        x = visible_tokens(x, self.dim, mask)
        query = self.query_tokens.expand(len(x), -1, -1)
        key, value = self.kv(self.norm1(x)).chunk(2, -1)
        y = query + self.proj(attend(self.q(query), key, value, heads=self.heads, mask=mask))
        return (y + self.mlp(self.norm2(y)))[:, 0]
