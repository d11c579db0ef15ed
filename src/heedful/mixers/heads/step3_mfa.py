"""Multi-matrix factorization attention: many wide query heads of low rank, one key and value head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import check_mask, check_positions, check_positive, check_tokens
from heedful.mixers.heads.self_attention import next_angles
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import KVState
from heedful.ops.attention import attention
from heedful.ops.rotary import rotate
from heedful.patterns.causal import Causal
from heedful.registry import register


@register(
    "step3-mfa",
    kind="sequence",
    paper="step3-mfa",
    tags=("heads", "softmax", "multi-query", "low-rank"),
    aliases=("mfa", "multi-matrix-factorization-attention"),
    causal="optional",
    cross=True,
    decode=True,
    complexity="O(N^2 heads head_dim)",
)
class MultiMatrixFactorizationAttention(Mixer):
    """Multi-query attention with wide heads, whose query projection is two matrices with a norm between.

        q = RMS(x W_qd) W_q,  k = s W_k,  v = s W_v,  y = concat_h(softmax(q_h k^T / sqrt(d)) v) W_o

    s is the context if there is one, else x; all heads read the one key and value head. Nothing has a bias.

    dim          channels of x, of the context and of y
    heads        query heads
    head_dim     channels of each query head, of the key and of the value, d
    query_rank   channels between W_qd and W_q
    rotary_base  of the rotary embedding over all of d (channel j with j + d / 2); None: none
    norm_eps     of the RMS normalisation over `query_rank`
    causal       a token sees itself and what came before; needed to decode
    dropout      share of the attention weights dropped in training

    forward: mask (b, n) hides tokens of x as keys, context_mask (b, m) those of the context. With a context
    neither `causal` nor the rotary embedding acts. State: 2 d numbers a token, keys rotated.
    Raises ValueError on wrong shapes, and where a state comes with a context.
    Source: Step-3, arXiv 2507.19427; Multi-matrix Factorization Attention, arXiv 2412.19255.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "head_dim": 8, "query_rank": 12}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 64,
        head_dim: int = 256,
        query_rank: int = 2048,
        rotary_base: float | None = 500000.0,
        norm_eps: float = 1e-5,
        causal: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        for name, number in (("heads", heads), ("head_dim", head_dim), ("query_rank", query_rank)):
            check_positive(name, number)
        if rotary_base is not None and head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}, must be even unless rotary_base is None")
        self.heads, self.head_dim = heads, head_dim
        self.causal, self.rotary_base, self.dropout = causal, rotary_base, dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_down = nn.Linear(dim, query_rank, bias=False, **factory)
        self.query_norm = nn.RMSNorm(query_rank, eps=norm_eps, **factory)
        self.query_up = nn.Linear(query_rank, heads * head_dim, bias=False, **factory)
        self.key = nn.Linear(dim, head_dim, bias=False, **factory)
        self.value = nn.Linear(dim, head_dim, bias=False, **factory)
        self.out = nn.Linear(heads * head_dim, dim, bias=False, **factory)

    def init_state(self, batch: int) -> KVState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                "causal is False, must be True to decode: later tokens would change earlier ones"
            )
        return KVState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: KVState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], KVState]:
        source = self._door(x, context, mask, context_mask, positions, state)
        # 1., 2. Queries through the bottleneck; one key and one value a token.
        low = self.query_down(x)
        low = self.query_norm(low.to(self.query_norm.weight.dtype)).to(low.dtype)  # half under autocast
        query = rearrange(self.query_up(low), "b n (h d) -> b h n d", h=self.heads)
        key, value = self.key(source)[:, None], self.value(source)[:, None]
        # 3. Rotary embedding over the whole width.
        if self.rotary_base is not None and context is None:
            angles = next_angles(x, self.head_dim, positions, state, base=self.rotary_base)
            query, key = rotate(query, angles), rotate(key, angles)
        # 4., 5. Softmax attention of all heads over the one key head.
        seen = mask if context is None else context_mask
        if state is not None:
            state = state.append(key, value, mask)
            assert state.key is not None
            assert state.value is not None
            key, value, seen = state.key, state.value, state.mask
        pattern = Causal() if self.causal and context is None else None
        dropout = self.dropout if self.training else 0.0
        heads = attention(query, key, value, pattern=pattern, key_mask=seen, dropout_p=dropout)
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return y if state is None else (y, state)

    def _door(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        context_mask: Tensor | None,
        positions: Tensor | None,
        state: KVState | None,
    ) -> Tensor:
        """Check the arguments; give back where keys and values come from."""
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if context is None:
            if context_mask is not None:
                raise ValueError("context_mask is given, must come with a context")
            return x
        check_tokens("context", context, self.dim)
        check_mask("context_mask", context_mask, context.shape[0], context.shape[1])
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context has batch {context.shape[0]}, must be {x.shape[0]}, that of x")
        if state is not None:
            raise ValueError("state is given, must be None with a context: a state is of self-attention")
        return context
