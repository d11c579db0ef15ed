"""CAE pool: one learned query, with queries, keys and values normalised apart."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_divides
from heedful.mixers.mixer import Mixer
from heedful.mixers.pooling.token_attention import attend, query_tokens, visible_tokens
from heedful.registry import register


@register(
    "cae-pool",
    kind="pool",
    paper="efficient-probing",
    tags=("pooling", "probe"),
    complexity="O(N C^2)",
)
class CAEPool(Mixer):
    """Cross attention of a learned query, each of its three inputs under a layer norm of its own.

        q = Wq LNq(query),  k = Wk LNk(x),  v = Wv LNv(x)
        y = Wo softmax(q k^T / sqrt(dim / heads)) v + bo

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
        self.query_token = query_tokens(1, dim, **made)
        self.norm1_q = nn.LayerNorm(dim, **made)
        self.norm1_k = nn.LayerNorm(dim, **made)
        self.norm1_v = nn.LayerNorm(dim, **made)
        self.q = nn.Linear(dim, dim, bias=False, **made)
        self.k = nn.Linear(dim, dim, bias=False, **made)
        self.v = nn.Linear(dim, dim, bias=False, **made)
        self.proj = nn.Linear(dim, dim, **made)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        x = visible_tokens(x, self.dim, mask)
        query = self.q(self.norm1_q(self.query_token)).expand(len(x), -1, -1)
        key, value = self.k(self.norm1_k(x)), self.v(self.norm1_v(x))
        return self.proj(attend(query, key, value, heads=self.heads, mask=mask))[:, 0]
