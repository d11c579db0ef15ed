"""Grouped differential attention: signal heads less the noise heads that they share."""

from __future__ import annotations

import math
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


def depth_lambda(depth: int) -> float:
    """The published start of lambda in a layer: 0.8 - 0.6 exp(-0.3 depth).

    depth  layers before this one: 0 in the first layer of the Differential Transformer, hence 0.2. Motif's
           released weights count one less: -1 in the first layer, hence -0.0099.

    Source: Differential Transformer, arXiv 2410.05258; MotifTechnologies/vllm.
    """
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


@register(
    "grouped-differential-attention",
    kind="sequence",
    paper="grouped-differential-attention",
    tags=("heads", "softmax", "differential"),
    aliases=("differential-attention",),
    causal="optional",
    decode=True,
    complexity="O(N^2 C)",
)
class GroupedDifferentialAttention(Mixer):
    """Softmax attention of signal heads, less lambda times that of noise heads, which groups of them share.

        o_a = softmax(q1_a k1^T / sqrt(d)) [v1, v2] - lambda softmax(q2_b k2^T / sqrt(d)) [v1, v2]
        lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init,  y = concat_a((1 - lambda_init) RMS(o_a)) W_o

    r = signal / noise heads; signal head a takes noise head b = a // r. Rows of the query projection stand in
    groups of r signal heads and their noise head; of the KV heads, the even ones are k1, v1 and the odd ones
    k2, v2. Signal and noise heads read pairs of KV heads as in grouped-query attention. As many noise as
    signal heads: differential attention.

    dim          channels
    heads        query heads, signal and noise together
    noise_heads  a divisor of the number of signal heads; None: heads / 2
    kv_heads     key and value heads, an even number whose half divides `noise_heads`; None: 2 noise_heads
    head_dim     channels a head, d; None: dim / heads
    lambda_init  start of lambda; `depth_lambda` gives the published one of a layer
    rotary_base  of the rotary embedding of all heads (channel j with j + d / 2); None: none
    norm_eps     of the RMS normalisation over the 2 d channels of a head, whose weight all heads share
    causal       a token sees itself and what came before; needed to decode
    qkv_bias     biases in W_q, W_k, W_v; W_o has none
    dropout      share of the attention weights dropped in training

    forward: mask (b, n) hides tokens as keys; keys and values are kept for all KV heads, keys rotated.
    Raises ValueError if heads do not divide, on wrong shapes, or if a context is given.
    Source: Grouped Differential Attention, arXiv 2510.06949; Differential Transformer, arXiv 2410.05258.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 8,
        "noise_heads": 2,
        "kv_heads": 4,
        "head_dim": 4,
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        noise_heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        lambda_init: float = 0.2,
        rotary_base: float | None = 10000.0,
        norm_eps: float = 1e-5,
        causal: bool = True,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("heads", heads)
        noise_heads = max(1, heads // 2) if noise_heads is None else noise_heads
        check_positive("noise_heads", noise_heads)
        if noise_heads >= heads:
            raise ValueError(f"heads is {heads}, must be more than noise_heads, which is {noise_heads}")
        signal_heads = heads - noise_heads
        check_divides("noise_heads", noise_heads, "heads - noise_heads", signal_heads)
        kv_heads = 2 * noise_heads if kv_heads is None else kv_heads
        check_positive("kv_heads", kv_heads)
        if kv_heads % 2 or noise_heads % (kv_heads // 2):
            raise ValueError(
                f"kv_heads is {kv_heads}, must be even, and half of it divide noise_heads, {noise_heads}"
            )
        if head_dim is None:
            check_divides("heads", heads, "dim", dim)
            head_dim = dim // heads
        check_positive("head_dim", head_dim)
        if rotary_base is not None and head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}, must be even unless rotary_base is None")
        self.heads, self.noise_heads, self.kv_heads, self.head_dim = heads, noise_heads, kv_heads, head_dim
        self.lambda_init, self.rotary_base = lambda_init, rotary_base
        self.causal, self.dropout = causal, dropout
        self.ratio = signal_heads // noise_heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, heads * head_dim, bias=qkv_bias, **factory)
        self.key = nn.Linear(dim, kv_heads * head_dim, bias=qkv_bias, **factory)
        self.value = nn.Linear(dim, kv_heads * head_dim, bias=qkv_bias, **factory)
        self.lambda_q1 = nn.Parameter(torch.randn(head_dim, **factory) * 0.1)
        self.lambda_k1 = nn.Parameter(torch.randn(head_dim, **factory) * 0.1)
        self.lambda_q2 = nn.Parameter(torch.randn(head_dim, **factory) * 0.1)
        self.lambda_k2 = nn.Parameter(torch.randn(head_dim, **factory) * 0.1)
        self.norm = nn.RMSNorm(2 * head_dim, eps=norm_eps, **factory)
        self.out = nn.Linear(2 * signal_heads * head_dim, dim, bias=False, **factory)

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
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        query, key, value = (
            rearrange(y, "b n (h d) -> b h n d", d=self.head_dim)
            for y in (self.query(x), self.key(x), self.value(x))
        )
        if self.rotary_base is not None:
            angles = next_angles(x, self.head_dim, positions, state, base=self.rotary_base)
            query, key = rotate(query, angles), rotate(key, angles)
        seen = mask
        if state is not None:
            state = state.append(key, value, mask)
            assert state.key is not None
            assert state.value is not None
            key, value, seen = state.key, state.value, state.mask
        heads = self.difference(query, key, value, mask=seen)
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return y if state is None else (y, state)

    def difference(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b g m d"],
        value: Float[Tensor, "b g m d"],
        *,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b signal n d2"]:
        """What the signal heads give to W_o, from rotated queries and keys; d2 = 2 d."""
        # 2., 3. Signal and noise: queries in stripes of r and 1, keys and values by parity.
        striped = query.unflatten(1, (self.noise_heads, self.ratio + 1))
        signal, noise = striped[:, :, :-1].flatten(1, 2), striped[:, :, -1]
        key1, key2 = key[:, 0::2], key[:, 1::2]
        both = torch.cat([value[:, 0::2], value[:, 1::2]], dim=-1)
        # 4. Two softmaxes over the same values.
        pattern = Causal() if self.causal else None
        dropout = self.dropout if self.training else 0.0
        o1 = attention(signal, key1, both, pattern=pattern, key_mask=mask, dropout_p=dropout)
        o2 = attention(noise, key2, both, pattern=pattern, key_mask=mask, dropout_p=dropout)
        # 5. to 7. The difference, normalised.
        o = o1 - self.lambda_full().to(o1.dtype) * o2.repeat_interleave(self.ratio, dim=1)
        normed = self.norm(o.to(self.norm.weight.dtype)).to(o.dtype)  # under autocast o is in half precision
        return normed * (1 - self.lambda_init)

    def lambda_full(self) -> Float[Tensor, ""]:
        """The factor of the noise."""
        wide = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        q1, k1, q2, k2 = (
            p.to(wide) for p in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        )
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init
