"""SimPool: the mean token asks, the normalised tokens answer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_divides
from heedful.mixers.mixer import Mixer
from heedful.mixers.pooling.token_attention import attend, mean_token, visible_tokens
from heedful.registry import register


@register(
    "simpool",
    kind="pool",
    paper="efficient-probing",
    tags=("pooling", "probe"),
    complexity="O(N C^2)",
)
class SimPool(Mixer):
    """Attention of the projected mean token over the tokens, whose normalised selves are the values.

        q = Wq mean_n x,  k = Wk LN(x),  v = LN(x)
        y = softmax(q k^T / sqrt(dim / heads)) v

    dim    channels
    heads  attention heads, divides dim

    `mask` (b, n) hides tokens where it is False.
    Raises ValueError if heads does not divide dim.
    Source: the comparison in Attention, Please! Revisiting Attentive Probing for Masked Image Modeling,
    arXiv 2506.10178.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6, **made)
        self.wq = nn.Linear(dim, dim, bias=False, **made)
        self.wk = nn.Linear(dim, dim, bias=False, **made)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        x = visible_tokens(x, self.dim, mask)
        query = self.wq(mean_token(x, mask))
        value = self.norm_patches(x)
        return attend(query, self.wk(value), value, heads=self.heads, mask=mask)[:, 0]
