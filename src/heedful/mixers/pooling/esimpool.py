"""SimPool without projections: the mean token attends to the normalised tokens."""

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
    "esimpool",
    kind="pool",
    paper="efficient-probing",
    tags=("pooling", "probe"),
    complexity="O(N C)",
)
class ESimPool(Mixer):
    """Attention of the mean token over normalised tokens, in heads, with nothing learned but the norm.

        q = mean_n x,  k = v = LN(x)
        y = softmax(q k^T / sqrt(dim / heads)) v

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
        heads: int = 12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        x = visible_tokens(x, self.dim, mask)
        value = self.norm_patches(x)
        return attend(mean_token(x, mask), value, value, heads=self.heads, mask=mask)[:, 0]
