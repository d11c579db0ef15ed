"""Compressed convolutional attention: the whole of attention in a narrow latent space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
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
from heedful.patterns.window import Window
from heedful.registry import register


@dataclass(frozen=True)
class CCAState(KVState):
    """Compressed keys and values, what the convolutions still need, and the last token's delayed values."""

    columns: Float[Tensor, "b t channels"] | None = None  # the last inputs of the convolutions
    delayed: Float[Tensor, "b 1 half"] | None = None


@register(
    "cca",
    kind="sequence",
    paper="cca",
    tags=("heads", "softmax", "convolution", "compressed"),
    aliases=("compressed-convolutional-attention", "ccgqa"),
    causal="always",
    decode=True,
    complexity="O(N^2 heads head_dim)",
)
class CompressedConvolutionalAttention(Mixer):
    """Causal grouped-query attention between projections to few channels, with convolved queries and keys.

        q', k' = x W_q, x W_k;  mq_h = (q'_h + k'_g) / 2,  mk_g = mean of mq_h over the heads of group g
        q, k = conv2(conv1(concat(q', k'))) + (mq, mk)
        q <- sqrt(d) q / |q|,  k <- temp_g sqrt(d) k / |k|,  both then turned (rotary)
        v_t = concat(x_t W_v1, x_(t-1) W_v2),  y = concat_h(softmax(q_h k_g^T / sqrt(d)) v_g) W_o

    conv1 is depthwise, conv2 mixes the channels of each head; both are causal, have biases, and nothing
    stands between them. Zeros precede the sequence, once for both. Half of v is a token late: with several
    KV heads the first half of them holds the current token, the second the one before.

    dim              channels
    heads            query heads
    kv_heads         key and value heads, a divisor of `heads`
    head_dim         channels a head, d; heads * head_dim < dim compresses
    channel_kernel   width of conv1
    head_kernel      width of conv2
    rotary_base      of the rotary embedding (channel j with j + r of the first 2 r)
    rotary_fraction  share of the channels of a head that are turned
    window           keys that a token sees, itself and those before it, as in ZAYA1's sliding layers (with
                     rotary_base 1e4); None: all before it
    qkv_bias         biases in W_q, W_k, W_v1, W_v2; W_o has none
    dropout          share of the attention weights dropped in training

    The key temperatures `temp` start at 1. forward: mask (b, n) hides keys, and to the projections a masked
    token is a zero vector. State: 2 kv_heads head_dim numbers a token, and a few of the last tokens; those
    that a window has left behind are kept, too.
    Raises ValueError if heads do not divide, on wrong shapes, or if a context is given.
    Source: Compressed Convolutional Attention, arXiv 2510.04476.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "kv_heads": 2, "head_dim": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int = 2,
        head_dim: int = 128,
        channel_kernel: int = 2,
        head_kernel: int = 2,
        rotary_base: float = 5e6,
        rotary_fraction: float = 0.5,
        window: int | None = None,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("heads", heads)
        check_divides("kv_heads", kv_heads, "heads", heads)
        for name, number in (
            ("head_dim", head_dim),
            ("channel_kernel", channel_kernel),
            ("head_kernel", head_kernel),
        ):
            check_positive(name, number)
        if kv_heads * head_dim % 2:
            raise ValueError(
                f"head_dim is {head_dim}, kv_heads * head_dim must be even: half of v is delayed"
            )
        rotary_dim = int(head_dim * rotary_fraction)
        if not 0 <= rotary_dim <= head_dim or rotary_dim % 2:
            raise ValueError(
                f"rotary_fraction is {rotary_fraction}, must turn an even number of {head_dim} channels"
            )
        if window is not None:
            check_positive("window", window)
        self.pattern = Causal() if window is None else Window(window - 1, 0)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rotary_dim, self.rotary_base, self.dropout = rotary_dim, rotary_base, dropout
        self.reach = channel_kernel + head_kernel - 2  # tokens before, that the convolutions see
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_dim, all_heads = kv_heads * head_dim, heads + kv_heads
        self.query = nn.Linear(dim, heads * head_dim, bias=qkv_bias, **factory)
        self.key = nn.Linear(dim, kv_dim, bias=qkv_bias, **factory)
        self.value = nn.Linear(dim, kv_dim // 2, bias=qkv_bias, **factory)
        self.value_delayed = nn.Linear(dim, kv_dim // 2, bias=qkv_bias, **factory)
        channels = all_heads * head_dim
        self.channel_conv = nn.Conv1d(channels, channels, channel_kernel, groups=channels, **factory)
        self.head_conv = nn.Conv1d(channels, channels, head_kernel, groups=all_heads, **factory)
        self.temp = nn.Parameter(torch.ones(kv_heads, **factory))
        self.out = nn.Linear(heads * head_dim, dim, bias=False, **factory)

    def init_state(self, batch: int) -> CCAState:
        """The state before the first token of `batch` sequences."""
        return CCAState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: CCAState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], CCAState]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        query, key, value, columns, delayed = self.project(x, mask=mask, state=state)
        query, key = self.normalise(query, key)
        if self.rotary_dim:
            angles = next_angles(x, self.rotary_dim, positions, state, base=self.rotary_base)
            query, key = rotate(query, angles), rotate(key, angles)
        seen = mask
        if state is not None:
            kept = state.append(key, value, mask)
            assert kept.key is not None
            assert kept.value is not None
            key, value, seen = kept.key, kept.value, kept.mask
            state = CCAState(kept.length, key, value, seen, columns, delayed)
        dropout = self.dropout if self.training else 0.0
        heads = attention(query, key, value, pattern=self.pattern, key_mask=seen, dropout_p=dropout)
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return y if state is None else (y, state)

    def project(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        state: CCAState | None = None,
    ) -> tuple[
        Float[Tensor, "b h n d"],
        Float[Tensor, "b g n d"],
        Float[Tensor, "b g n d"],
        Float[Tensor, "b t channels"],
        Float[Tensor, "b 1 e"],
    ]:
        """Queries and keys before the normalisation, values, and the two short memories of a state."""
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        before = CCAState() if state is None else state
        # 1., 2. Projections, and their means over the pairs of query and key.
        joined = torch.cat([self.query(x), self.key(x)], dim=-1)
        query, key = self._split(joined)
        shared = repeat(key, "b g n d -> b (g r) n d", r=self.heads // self.kv_heads)
        query_mean = (query + shared) / 2
        key_mean = reduce(query_mean, "b (g r) n d -> b g n d", "mean", g=self.kv_heads)
        # 3., 4. Convolutions over time, behind zeros or the last tokens.
        columns = before.columns
        if columns is None:
            columns = joined.new_zeros(x.shape[0], self.reach, joined.shape[-1])
        columns = torch.cat([columns, joined], dim=1)
        if x.shape[1]:
            joined = self.head_conv(self.channel_conv(columns.mT)).mT
        query, key = self._split(joined)
        query, key = query + query_mean, key + key_mean
        # 7. Values of the token and of the one before; a zero vector precedes the first.
        delayed = before.delayed
        if delayed is None:
            delayed = self.value_delayed(x.new_zeros(x.shape[0], 1, self.dim))
        delayed = torch.cat([delayed, self.value_delayed(x)], dim=1)
        value = torch.cat([self.value(x), delayed[:, :-1]], dim=-1)
        value = rearrange(value, "b n (g d) -> b g n d", d=self.head_dim)
        return query, key, value, columns[:, x.shape[1] :], delayed[:, -1:]

    def normalise(
        self, query: Float[Tensor, "b h n d"], key: Float[Tensor, "b g n d"]
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b g n d"]]:
        """Queries of length sqrt(d), keys of length sqrt(d) |temp|."""
        root, eps = self.head_dim**0.5, torch.finfo(query.dtype).eps
        query, key = (F.normalize(y, dim=-1, eps=eps) * root for y in (query, key))
        return query, key * self.temp[:, None, None].to(key.dtype)

    def _split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        both = rearrange(joined, "b n (h d) -> b h n d", d=self.head_dim)
        return both[:, : self.heads], both[:, self.heads :]
