"""Softmax attention with several heads: multi-head, grouped-query, multi-query."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import check_divides, check_mask, check_positions, check_positive, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import KVState, State
from heedful.ops.attention import attention
from heedful.ops.rotary import rotary_angles, rotate
from heedful.patterns.causal import Causal
from heedful.patterns.pattern import Pattern
from heedful.registry import register


@register(
    "self-attention",
    kind="sequence",
    paper="attention-is-all-you-need",
    tags=("heads", "softmax"),
    aliases=("dense", "multi-head-attention"),
    causal="optional",
    cross=True,
    decode=True,
    complexity="O(N^2 C)",
)
class SelfAttention(Mixer):
    """Softmax attention of all heads over all tokens, or over those that a pattern shows.

        q = x W_q,  k = s W_k,  v = s W_v,  y = concat_h(softmax(q_h k_g^T / sqrt(d)) v_g) W_o

    s is the context if there is one, else x; head h reads the KV head g = h // (heads / kv_heads).

    dim       channels of x, of the context and of y
    heads     query heads
    kv_heads  key and value heads, a divisor of `heads`: 1 is multi-query; None: as many as `heads`
    head_dim  channels a head; None: dim / heads
    causal    a token sees itself and what came before; needed to decode
    rotary    rotary position embedding on queries and keys (channel j pairs with j + head_dim / 2)
    pattern   who sees whom, any heedful pattern; with `causal` what both show
    qkv_bias  biases in W_q, W_k, W_v; W_o always has one
    dropout   share of the attention weights dropped in training

    forward: mask (b, n) hides tokens of x as keys, context_mask (b, m) those of the context; positions (n)
    or (b, n) are for the rotary embedding and continue from the state by default; keys are kept rotated.
    `causal`, `pattern` and `rotary` are for self-attention: with a context none of them acts. A token that
    sees nothing gives the bias of W_o.
    Raises ValueError if heads do not divide, on wrong shapes, and where a state comes with a context.
    Source: Attention Is All You Need, arXiv 1706.03762; GQA, arXiv 2305.13245.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "kv_heads": 2}
    pairing: ClassVar[str] = "half"  # of the channels in the rotary embedding

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        rotary: bool = False,
        pattern: Pattern | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        kv_heads = heads if kv_heads is None else kv_heads
        check_divides("kv_heads", kv_heads, "heads", heads)
        if head_dim is None:
            check_divides("heads", heads, "dim", dim)
            head_dim = dim // heads
        check_positive("head_dim", head_dim)
        if rotary and head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}, must be even for rotary=True")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.causal, self.rotary, self.dropout = causal, rotary, dropout
        self.pattern = pattern if not causal else Causal() if pattern is None else Causal() & pattern
        self.query = nn.Linear(dim, heads * head_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.key = nn.Linear(dim, kv_heads * head_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.value = nn.Linear(dim, kv_heads * head_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.out = nn.Linear(heads * head_dim, dim, device=device, dtype=dtype)

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
        query, key, value = (
            rearrange(y, "b n (h d) -> b h n d", d=self.head_dim)
            for y in (self.query(x), self.key(source), self.value(source))
        )
        pattern, seen = self.pattern, mask
        if context is not None:
            pattern, seen = None, context_mask
        elif self.rotary:
            angles = next_angles(x, self.head_dim, positions, state)
            query, key = (rotate(y, angles, pairing=self.pairing) for y in (query, key))
        if state is not None:
            state = state.append(key, value, mask)
            assert state.key is not None
            assert state.value is not None
            key, value, seen = state.key, state.value, state.mask
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


def next_angles(
    x: Float[Tensor, "b n c"],
    dim: int,
    positions: Shaped[Tensor, "*rows n"] | None,
    state: State | None,
    *,
    base: float = 10000.0,
) -> Float[Tensor, "*rows n pairs"]:
    """Rotary angles of the tokens of x: at their positions, by default those that follow the state's."""
    if positions is None:
        start = 0 if state is None else state.length
        positions = torch.arange(start, start + x.shape[1], device=x.device)
    return rotary_angles(positions, dim, base=base, dtype=x.dtype)
