"""Mixture-of-head attention: every token weighs the heads, and chooses among some of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.state import KVState
from heedful.ops.attention import attention
from heedful.registry import register
from heedful.routing.head_gate import HeadGate, default_shares


@register(
    "moh",
    kind="sequence",
    paper="moh",
    tags=("heads", "softmax", "gate", "router"),
    aliases=("mixture-of-head-attention",),
    causal="optional",
    cross=True,
    decode=True,
    complexity="O(N^2 C)",
)
class MixtureOfHeadAttention(SelfAttention):
    """Multi-head attention whose heads are experts: shared heads for all tokens, the rest by choice.

        y = concat_h(g_h(x) softmax(q_h k_h^T / sqrt(d)) v_h) W_o,   g: see `HeadGate`

    This is the form of the authors' diffusion models. Heads that a token leaves out cost what the others do.

    dim           channels of x, of the context and of y
    heads         all heads; the first `shared_heads` of them are always on
    shared_heads  None: half of the heads
    routed_heads  how many of the others are on for a token; None: half of them
    head_dim      channels a head, d; None: dim / heads
    qk_norm       layer normalisation of queries and keys over d
    load_balance  weight of the auxiliary loss; the published 0.01 is for the mean over layers
    causal, qkv_bias, dropout and the arguments of forward are those of `SelfAttention`; the gate reads x.

    In training aux_losses["load_balance"] tells, weighed, how unevenly the routed heads are used.
    Keys and values of all heads are kept, as a later token may choose any.
    Raises ValueError if heads do not divide or their numbers do not fit.
    Source: MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 12, "heads": 6, "shared_heads": 2, "routed_heads": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        load_balance: float = 0.01,
        causal: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive("heads", heads)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim,
            heads=heads,
            head_dim=head_dim,
            causal=causal,
            qkv_bias=qkv_bias,
            dropout=dropout,
            **factory,
        )
        self.load_balance = load_balance
        shared_heads, routed_heads = default_shares(heads, shared_heads, routed_heads)
        self.gate = HeadGate(dim, heads=heads, shared=shared_heads, routed=routed_heads, **factory)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.query_norm = nn.LayerNorm(self.head_dim, **factory) if qk_norm else None
        self.key_norm = nn.LayerNorm(self.head_dim, **factory) if qk_norm else None

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
        query, key = _normed(self.query_norm, query), _normed(self.key_norm, key)
        pattern, seen = (self.pattern, mask) if context is None else (None, context_mask)
        if state is not None:
            state = state.append(key, value, mask)
            assert state.key is not None
            assert state.value is not None
            key, value, seen = state.key, state.value, state.mask
        dropout = self.dropout if self.training else 0.0
        heads = attention(query, key, value, pattern=pattern, key_mask=seen, dropout_p=dropout)
        gates, loss = self.gate(x, mask=mask)
        self.aux_losses = (
            {"load_balance": self.load_balance * loss} if self.training and loss is not None else {}
        )
        heads = heads * rearrange(gates, "b n h -> b h n 1").to(heads.dtype)
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return y if state is None else (y, state)


def _normed(norm: nn.LayerNorm | None, x: Tensor) -> Tensor:
    # Under autocast x is in half precision while the norm's weight is not.
    return x if norm is None else norm(x.to(norm.weight.dtype)).to(x.dtype)
