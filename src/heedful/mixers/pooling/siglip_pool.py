"""SigLIP pool: a learned latent attends to the tokens, then passes a feed-forward."""

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
    "siglip-pool",
    kind="pool",
    paper="efficient-probing",
    tags=("pooling", "probe"),
    complexity="O(N C^2)",
)
class SigLIPPool(Mixer):
    """Attention of a learned latent over the tokens, with a residual feed-forward and no norm.

        a = Wo softmax(q k^T / sqrt(dim / heads)) v + bo,   q = Wq latent,  [k, v] = Wkv x
        y = a + FFN(a)

    All projections have a bias; the feed-forward has 4 dim hidden channels.

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
        heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.latent = query_tokens(1, dim, **made)
        self.q = nn.Linear(dim, dim, **made)
        self.kv = nn.Linear(dim, 2 * dim, **made)
        self.proj = nn.Linear(dim, dim, **made)
        self.mlp = FeedForward(dim, **made)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        x = visible_tokens(x, self.dim, mask)
        query = self.q(self.latent).expand(len(x), -1, -1)
        key, value = self.kv(x).chunk(2, -1)
        y = self.proj(attend(query, key, value, heads=self.heads, mask=mask))
        return (y + self.mlp(y))[:, 0]
