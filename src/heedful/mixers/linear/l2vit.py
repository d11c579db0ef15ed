"""ReLU linear attention of L2ViT, its denominator bounded from below."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import check_divides, check_mask, check_no_context, check_positions, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.ops.linear import linear_attention
from heedful.registry import register

_FLOOR = 100.0  # of the denominator


@register(
    "l2vit",
    kind="sequence",
    paper="l2vit",
    tags=("linear",),
    aliases=("relu-linear-attention",),
    complexity="O(N C^2 / heads)",
)
class ReLULinearAttention(Mixer):
    """Linear attention with features relu, a bounded denominator and a learned temperature a head.

        y_i = W_o concat_h t_h sum_j (relu(q_i) . relu(k_j)) v_j / max(100, sum_j relu(q_i) . relu(k_j))

    The temperature t, (heads, 1, 1), starts at 1 / sqrt(d) and stands outside of the quotient: weights sum
    to t, and to less where the denominator is below 100. A query that relu makes zero gives zeros.

    dim       channels
    heads     divides dim
    qkv_bias  whether the projection of queries, keys and values has a bias

    forward: mask (b, n) takes tokens out of both sums; `positions` have no effect.
    Raises ValueError if heads does not divide dim, and if a context or a state is given.
    Source: L2ViT, arXiv 2501.16182.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        start = torch.full((heads, 1, 1), (dim // heads) ** -0.5, device=device, dtype=dtype)
        self.temperature = nn.Parameter(start)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: None = None,
    ) -> Float[Tensor, "b n c"]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if state is not None:
            raise ValueError("state is given, must be None: this mixer does not decode")
        read, total = self._sums(x, mask)
        y = read * (self.temperature / total.clamp(min=_FLOOR))  # 2, 3
        return self.proj(rearrange(y.to(x.dtype), "b h n d -> b n (h d)"))  # 4

    def denominators(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b h n 1"]:
        """sum_j relu(q_i) . relu(k_j) of each query, before the bound; float32 at least."""
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        return self._sums(x, mask)[1]

    def _sums(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Numerator and denominator. In float32 at least: the denominator is a sum over all tokens."""
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = (t.to(torch.promote_types(t.dtype, torch.float32)).relu() for t in (q, k))  # 1
        if mask is not None:
            k = k.masked_fill(~mask[:, None, :, None], 0)
            v = v.masked_fill(~mask[:, None, :, None], 0)  # 0 times infinity is no number
        sums = linear_attention(q, k, F.pad(v, (0, 1), value=1.0), causal=False)  # the 1 counts the weights
        assert isinstance(sums, Tensor)
        return sums[..., :-1], sums[..., -1:]
