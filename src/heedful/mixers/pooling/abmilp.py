"""ABMILP: every token is scored by a small network, softmax of the scores weighs the tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.mixers.mixer import Mixer
from heedful.mixers.pooling.token_attention import attend, visible_tokens
from heedful.registry import register


@register(
    "abmilp",
    kind="pool",
    paper="efficient-probing",
    tags=("pooling", "probe"),
    complexity="O(N^2 C + N C^2)",
)
class ABMILP(Mixer):
    """Weighted sum of tokens that have attended to each other, weighed by a score of each.

        z = Wo softmax(q k^T / sqrt(dim)) v + bo,   [q, k, v] = Wqkv x     (one head, no residual)
        s = w2 tanh(W1 z + b1) + b2
        y = sum_n softmax_n(s)_n z_n

    dim             channels
    self_attention  without it z = x and the cost is O(N C^2)

    `mask` (b, n) hides tokens where it is False; a row without tokens gives zeros.
    Source: the comparison in Attention, Please! Revisiting Attentive Probing for Masked Image Modeling,
    arXiv 2506.10178.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16}

    def __init__(
        self,
        dim: int,
        *,
        self_attention: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.self_attention = self_attention
        if self_attention:
            self.qkv = nn.Linear(dim, 3 * dim, bias=False, **made)
            self.proj = nn.Linear(dim, dim, **made)
        self.attention_predictor = nn.Sequential(
            nn.Linear(dim, dim, **made), nn.Tanh(), nn.Linear(dim, 1, **made)
        )

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        x = visible_tokens(x, self.dim, mask)
        z = x
        if self.self_attention:
            query, key, value = self.qkv(x).chunk(3, -1)
            z = self.proj(attend(query, key, value, heads=1, mask=mask))
        scores = self.attention_predictor(z)
        if mask is None:
            return (scores.softmax(1) * z).sum(1)
        hidden = ~mask[..., None]
        # The lowest finite score, not -inf: the softmax of a row without tokens stays finite.
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(1)
        return (weights.masked_fill(hidden, 0) * z).sum(1)
