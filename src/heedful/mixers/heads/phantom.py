"""Phantom: heads twice as wide inside attention, the second half made from one special token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
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


@dataclass(frozen=True)
class PhantomState(KVState):
    """Keys and values of all tokens seen, and the queries of the special token, the first real one."""

    special: Float[Tensor, "b hq 1 d"] | None = None


class PhantomCopy(nn.Module):
    """The second half of a token's heads: each head attends to the heads of the special token.

        y = eta gelu(W_o softmax(gelu(W_q x) gelu(W_k z)^T / sqrt(d)) gelu(W_v z))

    x (b, h, n, d) are the heads of the tokens, z (b, g, 1, d) those of the special token; all heads share
    the weights, which have no biases. The softmax runs over the g heads of z.
    """

    def __init__(
        self, head_dim: int, *, eta: float, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.eta = eta
        factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.query = nn.Linear(head_dim, head_dim, **factory)
        self.key = nn.Linear(head_dim, head_dim, **factory)
        self.value = nn.Linear(head_dim, head_dim, **factory)
        self.out = nn.Linear(head_dim, head_dim, **factory)

    def forward(self, x: Float[Tensor, "b h n d"], z: Float[Tensor, "b g 1 d"]) -> Float[Tensor, "b h n d"]:
        query, key, value = F.gelu(self.query(x)), F.gelu(self.key(z)), F.gelu(self.value(z))
        logits = torch.einsum("bhnd,bgd->bhng", query, key[:, :, 0]) * x.shape[-1] ** -0.5
        mixed = torch.einsum("bhng,bgd->bhnd", logits.softmax(-1).to(value.dtype), value[:, :, 0])
        return self.eta * F.gelu(self.out(mixed))


@register(
    "phantom",
    kind="sequence",
    paper="phantom",
    tags=("heads", "softmax", "gate", "multimodal"),
    aliases=("phantom-attention",),
    causal="always",
    decode=True,
    complexity="O(N^2 C)",
)
class PhantomAttention(Mixer):
    """Causal grouped-query attention in twice the width, mixed back by a gate.

        q' = [q, P_q(q, q*)],  k' = [k, P_k(k, k*)],  v' = [v, v + P_v(v, v*)]
        [o1, o2] = softmax(q' k'^T / sqrt(d)) v'
        w = sigmoid(u1 . o1 + c1 - u2 . o2 - c2),  y = concat_h(w o1 + (1 - w) o2) W_o

    q*, k*, v* are those of the special token, the first real token of each sequence; P: see `PhantomCopy`.
    Queries and keys are turned (rotary) before. With eta = 0 it is plain attention.

    dim          channels
    heads        query heads
    kv_heads     key and value heads, a divisor of `heads`; None: as many as `heads`
    head_dim     channels a head, d; None: dim / heads
    eta          size of the second halves
    rotary_base  of the rotary embedding (channel j with j + d / 2); None: none
    qkv_bias     biases in W_q, W_k, W_v; W_o has none
    dropout      share of the attention weights dropped in training

    State: keys and values without their second halves, which are made anew at each call, and the special
    token's queries once. forward: mask (b, n) hides tokens as keys; its first True is the special token.
    Raises ValueError if heads do not divide, on wrong shapes, and for a context.
    Source: Phantom of Latent for Large Language and Vision Models, arXiv 2409.14713.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "kv_heads": 2, "eta": 0.5}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        eta: float = 1e-4,
        rotary_base: float | None = 10000.0,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        kv_heads = heads if kv_heads is None else kv_heads
        check_positive("heads", heads)
        check_divides("kv_heads", kv_heads, "heads", heads)
        if head_dim is None:
            check_divides("heads", heads, "dim", dim)
            head_dim = dim // heads
        check_positive("head_dim", head_dim)
        if rotary_base is not None and head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}, must be even unless rotary_base is None")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rotary_base, self.dropout = rotary_base, dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, heads * head_dim, bias=qkv_bias, **factory)
        self.key = nn.Linear(dim, kv_heads * head_dim, bias=qkv_bias, **factory)
        self.value = nn.Linear(dim, kv_heads * head_dim, bias=qkv_bias, **factory)
        self.out = nn.Linear(heads * head_dim, dim, bias=False, **factory)
        self.query_copy = PhantomCopy(head_dim, eta=eta, **factory)
        self.key_copy = PhantomCopy(head_dim, eta=eta, **factory)
        self.value_copy = PhantomCopy(head_dim, eta=eta, **factory)
        self.gate_first = nn.Linear(head_dim, 1, **factory)
        self.gate_second = nn.Linear(head_dim, 1, **factory)

    def init_state(self, batch: int) -> PhantomState:
        """The state before the first token of `batch` sequences."""
        return PhantomState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: PhantomState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], PhantomState]:
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
        seen, old = mask, None
        if state is not None:
            kept, old = state.append(key, value, mask), state.special
            assert kept.key is not None
            assert kept.value is not None
            key, value, seen = kept.key, kept.value, kept.mask
        # 1. The special token.
        first = torch.zeros(len(x), dtype=torch.long, device=x.device)
        if seen is not None and seen.shape[1]:
            first = seen.long().argmax(1)
        new = first - (key.shape[2] - x.shape[1])  # its place among the tokens of x
        special = token_at(query, new.clamp(min=0))
        if old is not None:
            special = torch.where((new >= 0)[:, None, None, None], special, old)
        if state is not None:
            state = PhantomState(kept.length, key, value, seen, special)
        heads = self.attend(query, key, value, special=special, first=first, mask=seen)
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return y if state is None else (y, state)

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b g m d"],
        value: Float[Tensor, "b g m d"],
        *,
        special: Float[Tensor, "b h 1 d"],
        first: Int[Tensor, " b"],
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n d"]:
        """What the heads give to W_o; `first` is the place of the special token among the keys."""
        # 2., 3. Second halves.
        query = torch.cat([query, self.query_copy(query, special)], dim=-1)
        key = torch.cat([key, self.key_copy(key, token_at(key, first))], dim=-1)
        value = torch.cat([value, value + self.value_copy(value, token_at(value, first))], dim=-1)
        both = attention(
            query,
            key,
            value,
            pattern=Causal(),
            scale=self.head_dim**-0.5,
            key_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        # 4. Back to one width.
        one, two = both.chunk(2, dim=-1)
        weight = (self.gate_first(one) - self.gate_second(two)).sigmoid()
        return weight * one + (1 - weight) * two


def token_at(x: Float[Tensor, "b h n d"], place: Int[Tensor, " b"]) -> Float[Tensor, "b h 1 d"]:
    """The token of each row at a place; zeros where there is no token at all."""
    if not x.shape[2]:
        return x.new_zeros(*x.shape[:2], 1, x.shape[3])
    return x.gather(2, place[:, None, None, None].expand(-1, x.shape[1], 1, x.shape[3]))
