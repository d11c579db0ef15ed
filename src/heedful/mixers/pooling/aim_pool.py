"""AIM pool: batch-normalised tokens under learned queries, whose answers are averaged."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_positive
from heedful.mixers.mixer import Mixer
from heedful.mixers.pooling.token_attention import attend, norm_tokens, query_tokens, visible_tokens
from heedful.registry import register


@register(
    "aim-pool",
    kind="pool",
    paper="efficient-probing",
    tags=("pooling", "probe"),
    complexity="O(N C^2)",
)
class AIMPool(Mixer):
    """Attention of learned queries over batch-normalised tokens, averaged over the queries.

        z = BN(x),  k = Wk z,  v = Wv z
        y = mean_m softmax(q_m k^T / sqrt(dim / heads)) v

    BN has no affine weights; in training its statistics run over all visible tokens of the batch, a channel
    at a time (over fewer than two tokens it keeps the running ones). There is no output projection.

    dim      channels
    heads    attention heads, divides dim
    queries  number of learned queries

    `mask` (b, n) hides tokens where it is False.
    Raises ValueError if heads does not divide dim or queries is below 1.
    Source: the comparison in Attention, Please! Revisiting Attentive Probing for Masked Image Modeling,
    arXiv 2506.10178.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "queries": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 16,
        queries: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("queries", queries)
        self.heads = heads
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bn = nn.BatchNorm1d(dim, affine=False, eps=1e-6, **made)
        self.k = nn.Linear(dim, dim, bias=False, **made)
        self.v = nn.Linear(dim, dim, bias=False, **made)
        self.cls_token = query_tokens(queries, dim, **made)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        x = visible_tokens(x, self.dim, mask)
        z = norm_tokens(self.bn, x, mask)
        query = self.cls_token.expand(len(x), -1, -1)
        return attend(query, self.k(z), self.v(z), heads=self.heads, mask=mask).mean(1)
