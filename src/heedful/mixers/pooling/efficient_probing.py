"""Efficient probing: learned queries attend to raw tokens, each pools its own slice of the values."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_mask, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.registry import register


@register(
    "efficient-probing",
    kind="pool",
    paper="efficient-probing",
    tags=("pooling", "probe"),
    complexity="O(N M C + N C^2)",
)
class EfficientProbing(Mixer):
    """Cross attention of M learned queries with the tokens themselves, one slice of the values a query.

        A = softmax_n(dim^-0.5 Q x^T)          (b, M, n)
        V = W x [+ bias]                       (b, n, c'),   c' = dim / d_out
        y[slice m] = sum_n A[m, n] V[n, slice m]

    There is no query, key or output projection. The probe of the paper is this pool, a batch norm without
    affine weights (eps 1e-6) and a linear classifier.

    dim       channels of the tokens
    queries   number M of learned queries, divides dim / d_out
    d_out     the pooled vector has dim / d_out channels
    qkv_bias  a bias on the value projection

    `mask` (b, n) hides tokens where it is False; a row without tokens gives zeros.
    Raises ValueError if d_out does not divide dim or queries does not divide dim / d_out.
    Source: Attention, Please! Revisiting Attentive Probing for Masked Image Modeling, arXiv 2506.10178.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "queries": 4}

    def __init__(
        self,
        dim: int,
        *,
        queries: int = 32,
        d_out: int = 1,
        qkv_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("d_out", d_out, "dim", dim)
        check_divides("queries", queries, "dim / d_out", dim // d_out)
        self.queries = queries
        self.v = nn.Linear(dim, dim // d_out, bias=qkv_bias, device=device, dtype=dtype)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, queries, dim, device=device, dtype=dtype))

    def attention_maps(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b q n"]:
        """The weights A of every query over the tokens, each row summing to 1 (to 0 without tokens)."""
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        if mask is None:
            return self._weights(x, None)
        return self._weights(x.masked_fill(~mask[..., None], 0), mask)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b e"]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)  # a hidden token may hold NaN, and 0 * NaN is NaN
        weights = self._weights(x, mask)
        values = self.v(x).unflatten(-1, (self.queries, -1))
        return torch.einsum("bmn,bnme->bme", weights.to(values.dtype), values).flatten(1)

    def _weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        logits = (self.cls_token * self.dim**-0.5) @ x.transpose(1, 2)
        if mask is None:
            return logits.softmax(-1)
        hidden = ~mask[:, None]
        # The lowest finite logit, not -inf: the softmax of a row without tokens stays finite.
        return logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(hidden, 0)
