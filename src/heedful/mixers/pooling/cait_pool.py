"""CaiT pool: a class-attention block, in which the class token also sees itself."""

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
    "cait-pool",
    kind="pool",
    paper="efficient-probing",
    tags=("pooling", "probe"),
    complexity="O(N C^2)",
)
class CaiTPool(Mixer):
    """One class-attention block with layer scale, of which the normalised class token is the result.

        u = LN1([cls; x])
        a = cls + gamma_1 * (Wo softmax(q k^T / sqrt(dim / heads)) v + bo),   q = Wq u_0,  k = Wk u,  v = Wv u
        y = LN(a + gamma_2 * FFN(LN2(a)))

    All projections have a bias; the feed-forward has 4 dim hidden channels. The two norms of the block have
    eps 1e-6, the last one 1e-5.

    dim          channels
    heads        attention heads, divides dim
    layer_scale  initial value of every gamma

    `mask` (b, n) hides tokens where it is False.
    Raises ValueError if heads does not divide dim.
    Source: the comparison in Attention, Please! Revisiting Attentive Probing for Masked Image Modeling,
    arXiv 2506.10178.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "layer_scale": 0.5}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        layer_scale: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cls_token = query_tokens(1, dim, **made)
        self.gamma_1 = nn.Parameter(torch.full((dim,), float(layer_scale), **made))
        self.gamma_2 = nn.Parameter(torch.full((dim,), float(layer_scale), **made))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **made)
        self.q = nn.Linear(dim, dim, **made)
        self.k = nn.Linear(dim, dim, **made)
        self.v = nn.Linear(dim, dim, **made)
        self.proj = nn.Linear(dim, dim, **made)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **made)
        self.mlp = FeedForward(dim, **made)
        self.norm = nn.LayerNorm(dim, **made)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        x = visible_tokens(x, self.dim, mask)
        cls = self.cls_token.expand(len(x), -1, -1).to(x.dtype)
        u = self.norm1(torch.cat((cls, x), 1))
        if mask is not None:
            mask = nn.functional.pad(mask, (1, 0), value=True)  # the class token is never hidden
        pooled = attend(self.q(u[:, :1]), self.k(u), self.v(u), heads=self.heads, mask=mask)
        y = cls + self.gamma_1 * self.proj(pooled)
        y = y + self.gamma_2 * self.mlp(self.norm2(y))
        return self.norm(y)[:, 0]
