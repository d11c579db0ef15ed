"""Mixture-of-head attention without parameters of its own, for language models that are already trained."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import (
    check_divides,
    check_mask,
    check_no_context,
    check_positions,
    check_positive,
    check_tokens,
)
from heedful.mixers.heads.self_attention import next_angles
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import KVState
from heedful.ops.attention import attention
from heedful.ops.rotary import rotate
from heedful.patterns.causal import Causal
from heedful.registry import register
from heedful.routing.head_gate import check_shares, chosen, default_shares, load_balance, wide_linear


@register(
    "moh-llama",
    kind="sequence",
    paper="moh",
    tags=("heads", "softmax", "router"),
    causal="always",
    decode=True,
    complexity="O(N^2 C)",
)
class MixtureOfHeadLlamaAttention(Mixer):
    """Causal grouped-query attention where a token switches off the heads whose queries are short.

        l_r = |q_r| of the heads r >= S, before the rotary embedding
        y = concat_h(m_h softmax(q_h k_g^T / sqrt(d)) v_g) W_o

    m is 1 for the first S heads and for the K largest of l, 0 for the rest: nothing is weighed, and there is
    no parameter beyond the attention's own. Nothing has a bias.

    dim           channels
    heads         query heads; the first `shared_heads` of them are always on
    kv_heads      key and value heads, a divisor of `heads`; None: as many as `heads`
    shared_heads  S; None: half of the heads
    routed_heads  K, how many of the others are on for a token; None: half of them. All: plain attention
    head_dim      channels a head, d; None: dim / heads
    load_balance  weight of the auxiliary loss; the published 0.01 is for the mean over layers
    rotary_base   of the rotary embedding (channel j with j + d / 2)
    dropout       share of the attention weights dropped in training

    In training aux_losses["load_balance"] tells, weighed, how unevenly the routed heads are used, from the
    softmax of l / std(l). forward: mask (b, n) hides tokens as keys.
    Raises ValueError if heads do not divide or their numbers do not fit, on wrong shapes, and for a context.
    Source: MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 8, "kv_heads": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 32,
        kv_heads: int | None = None,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        head_dim: int | None = None,
        load_balance: float = 0.01,
        rotary_base: float = 10000.0,
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
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}, must be even")
        shared_heads, routed_heads = default_shares(heads, shared_heads, routed_heads)
        check_shares(heads, shared_heads, routed_heads)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.shared_heads, self.routed_heads = shared_heads, routed_heads
        self.load_balance, self.rotary_base, self.dropout = load_balance, rotary_base, dropout
        factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.query = nn.Linear(dim, heads * head_dim, **factory)
        self.key = nn.Linear(dim, kv_heads * head_dim, **factory)
        self.value = nn.Linear(dim, kv_heads * head_dim, **factory)
        self.out = nn.Linear(heads * head_dim, dim, **factory)

    def init_state(self, batch: int) -> KVState:
        """The state before the first token of `batch` sequences."""
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
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        query, key, value = (
            rearrange(y, "b n (h d) -> b h n d", d=self.head_dim)
            for y in (self.query(x), self.key(x), self.value(x))
        )
        on, loss = self.switch(x, query, mask=mask)
        self.aux_losses = (
            {"load_balance": self.load_balance * loss} if self.training and loss is not None else {}
        )
        angles = next_angles(x, self.head_dim, positions, state, base=self.rotary_base)
        query, key = rotate(query, angles), rotate(key, angles)
        seen = mask
        if state is not None:
            state = state.append(key, value, mask)
            assert state.key is not None
            assert state.value is not None
            key, value, seen = state.key, state.value, state.mask
        dropout = self.dropout if self.training else 0.0
        heads = attention(query, key, value, pattern=Causal(), key_mask=seen, dropout_p=dropout)
        heads = heads * rearrange(on, "b n h -> b h n 1").to(heads.dtype)
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return y if state is None else (y, state)

    def switch(
        self,
        x: Float[Tensor, "b n c"],
        query: Float[Tensor, "b h n d"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> tuple[Bool[Tensor, "b n h"], Float[Tensor, ""] | None]:
        """Which heads are on for each token, and the loss of an uneven choice."""
        shared = torch.ones(*x.shape[:2], self.shared_heads, dtype=torch.bool, device=x.device)
        if not self.routed_heads:
            return shared, None
        # 1. Lengths of the queries of the heads to choose from.
        routed = rearrange(query[:, self.shared_heads :], "b h n d -> b n h d")
        if query.dtype in (torch.float16, torch.bfloat16):  # its rounding must not decide
            rows = self.query.weight[self.shared_heads * self.head_dim :]
            routed = wide_linear(x, rows).unflatten(-1, (-1, self.head_dim))
        length = routed.norm(dim=-1)
        # 2. The longest are on.
        taken = chosen(length, self.routed_heads)
        # 3. Probabilities for the loss; a single head has no deviation.
        if taken.shape[-1] > 1:
            spread = (length - length.mean(-1, keepdim=True)).square().sum(-1, keepdim=True)
            length = length / (spread / (taken.shape[-1] - 1)).clamp(min=1e-12).sqrt()
        return torch.cat([shared, taken], dim=-1), load_balance(length.softmax(-1), taken, mask)
