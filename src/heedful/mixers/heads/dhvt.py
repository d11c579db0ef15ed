"""Head-interacted attention: every head is also a token, and what these gather goes to the first token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heedful.checks import check_divides, check_mask, check_no_context, check_positions, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.ops.attention import attention
from heedful.registry import register


@register(
    "dhvt",
    kind="sequence",
    paper="dhvt",
    tags=("heads", "softmax", "image"),
    aliases=("head-interacted-attention",),
    complexity="O((N + H)^2 C), H heads",
)
class HeadInteractedAttention(Mixer):
    """Multi-head attention of the tokens of x and of one further token for each head.

        m_h = mean of x over the tokens, channels of head h;   t_h = gelu(LN(m_h W_t + b_t)) + P_h
        [y, u] = MHSA([x, t]);   y_0 += mean_h u_h

    W_t maps a head's d channels to all C and is shared by the heads; LN runs over each d of them. The first
    token is the class token.

    dim       channels
    heads     heads, and tokens for them; a divisor of dim
    qkv_bias  whether the projection of queries, keys and values has a bias
    dropout   of the output

    mask (b, n): a hidden token is no key and is left out of the means; the tokens of the heads are always
    seen. `positions` have no effect. Raises ValueError if heads do not divide dim, for a context and for a
    state. Source: DHVT, arXiv 2210.05958.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.heads, self.head_dim = heads, dim // heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.dropout = nn.Dropout(dropout)
        self.head_proj = nn.Linear(self.head_dim, dim, **factory)
        self.head_norm = nn.LayerNorm(self.head_dim, **factory)
        self.head_positions = nn.Parameter(torch.empty(1, heads, dim, **factory))
        nn.init.trunc_normal_(self.head_positions, std=0.02)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Int[Tensor, "*rows n"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "b n c"]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if state is not None:
            raise ValueError("state is given, must be None: the means of heads see all tokens")
        # 1., 2. A token for each head.
        own = self.head_tokens(x, mask)
        # 3. Attention of all tokens.
        tokens = torch.cat([x, own], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(x), self.heads)], dim=1)
        query, key, value = rearrange(
            self.qkv(tokens), "b n (three h d) -> three b h n d", three=3, h=self.heads
        ).unbind(0)
        heads = attention(query, key, value, key_mask=mask)
        y, own = self.proj(rearrange(heads, "b h n d -> b n (h d)")).split([x.shape[1], self.heads], dim=1)
        # 4. What the heads' tokens gathered goes to the first token.
        first = y[:, :1] + own.mean(1, keepdim=True)
        return self.dropout(torch.cat([first, y[:, 1:]], dim=1))

    def head_tokens(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b h c"]:
        """t: what each head's channels hold on the average, for all heads."""
        if mask is None:
            mean = x.sum(1) / max(1, x.shape[1])
        else:
            mean = x.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        wide = self.head_proj(rearrange(mean, "b (h d) -> b h d", h=self.heads))
        wide = self.head_norm(rearrange(wide, "b h (g d) -> b h g d", d=self.head_dim))
        return F.gelu(wide).flatten(2).to(x.dtype) + self.head_positions.to(x.dtype)
