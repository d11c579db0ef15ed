"""Gated attention: what the heads give is multiplied by a sigmoid of the token itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import (
    check_choice,
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

GATES = ("elementwise", "headwise", "shared", "constant", None)
POSITIONS = ("output", "value", "key", "query", "final")
FORMS = ("sigmoid", "silu", "ns-sigmoid", "additive")


@register(
    "gated-attention",
    kind="sequence",
    paper="gated-attention",
    tags=("heads", "softmax", "gate"),
    causal="optional",
    decode=True,
    complexity="O(N^2 C)",
)
class GatedAttention(Mixer):
    """Softmax attention whose result is gated, head by head, by the token that asks.

        y = concat_h(softmax(q_h k_g^T / sqrt(d)) v_g * sigmoid(x W_gate,h)) W_o

    q and k are normalised (RMS) a head and then turned (rotary, channel j with j + d / 2); the gate is
    neither. Without a gate this is the attention of Qwen3.

    dim            channels
    heads          query heads
    kv_heads       key and value heads, a divisor of `heads`; None: as many as `heads`
    head_dim       channels a head, d; None: dim / heads
    gate           "elementwise": one number a channel of a head; "headwise": one number a head; "shared": one
                   number a channel, the same for all heads; "constant": learned numbers, not of the token;
                   None: no gate
    gate_position  what is gated: "output" of each head (the paper's choice, G1), the "value" (G2), "key"
                   (G3) or "query" (G4) right after its projection, or "final", what leaves W_o (G5)
    gate_form      what is done with the logit g: "sigmoid", "silu" and "ns-sigmoid" (never below a half,
                   (1 + sigmoid(g)) / 2) multiply; "additive" adds silu(g)
    qk_norm        RMS normalisation of queries and keys over d, eps 1e-6
    rotary_base    of the rotary embedding; None: none
    causal         a token sees itself and what came before; needed to decode
    qkv_bias       biases in every projection, W_o among them
    dropout        share of the attention weights dropped in training

    At "output" the rows of elementwise and headwise gates stand in `query`, as the authors' do: KV head after
    KV head, first the rows of its queries and then of their gates. Other gates are a projection `gate`, or
    numbers `gate_logits`.
    Raises ValueError if heads do not divide, for a context, for a headwise or shared gate at "final", where
    there are no heads, and for a headwise gate of queries or keys under qk_norm, which would undo it.
    Source: Gated Attention for Large Language Models, arXiv 2505.06708.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "kv_heads": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        gate: str | None = "elementwise",
        gate_position: str = "output",
        gate_form: str = "sigmoid",
        qk_norm: bool = True,
        rotary_base: float | None = 10000.0,
        causal: bool = True,
        qkv_bias: bool = False,
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
        if rotary_base is not None and head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}, must be even unless rotary_base is None")
        check_choice("gate", gate, GATES)
        check_choice("gate_position", gate_position, POSITIONS)
        check_choice("gate_form", gate_form, FORMS)
        if gate in ("headwise", "shared") and gate_position == "final":
            raise ValueError(f"gate is {gate!r}, must be 'elementwise' at 'final', where there are no heads")
        if gate == "headwise" and gate_position in ("query", "key") and qk_norm:
            raise ValueError(
                f"gate is 'headwise', must be 'elementwise' at {gate_position!r} "
                "under qk_norm: the norm undoes one factor a head"
            )
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.gate_kind, self.gate_form = gate, gate_form
        self.gate_position = gate_position if gate else None
        self.causal, self.rotary_base, self.dropout = causal, rotary_base, dropout

        def linear(inputs: int, outputs: int) -> nn.Linear:
            layer = nn.Linear(inputs, outputs, bias=qkv_bias, device=device, dtype=dtype)
            nn.init.normal_(layer.weight, std=0.02)  # gates start near a half
            if qkv_bias:
                nn.init.zeros_(layer.bias)
            return layer

        gate_dim = 1 if gate == "headwise" else head_dim
        in_query = self.gate_position == "output" and gate in ("elementwise", "headwise")
        self.fused = gate_dim if in_query else 0  # gate rows a head inside `query`
        self.query = linear(dim, heads * (head_dim + self.fused))
        self.key = linear(dim, kv_heads * head_dim)
        self.value = linear(dim, kv_heads * head_dim)
        self.out = linear(heads * head_dim, dim)
        gated = kv_heads if gate_position in ("key", "value") else heads
        if gate == "constant":
            shape = (dim,) if gate_position == "final" else (gated, 1, head_dim)
            self.gate_logits = nn.Parameter(0.02 * torch.randn(shape, device=device, dtype=dtype))
        elif gate == "shared":
            self.gate = linear(dim, head_dim)
        elif self.gate_position is not None and not self.fused:
            self.gate = linear(dim, dim if gate_position == "final" else gated * gate_dim)
        self.query_norm = self.key_norm = None
        if qk_norm:
            self.query_norm = nn.RMSNorm(head_dim, eps=1e-6, device=device, dtype=dtype)
            self.key_norm = nn.RMSNorm(head_dim, eps=1e-6, device=device, dtype=dtype)

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
        query, key, value, gate = self.project(x, positions=positions, state=state)
        seen = mask
        if state is not None:
            state = state.append(key, value, mask)
            assert state.key is not None
            assert state.value is not None
            key, value, seen = state.key, state.value, state.mask
        pattern = Causal() if self.causal else None
        dropout = self.dropout if self.training else 0.0
        heads = attention(query, key, value, pattern=pattern, key_mask=seen, dropout_p=dropout)
        if self.gate_position == "output":
            heads = self._gated(heads, gate)
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        if self.gate_position == "final":
            y = self._gated(y, gate)
        return y if state is None else (y, state)

    def project(
        self,
        x: Float[Tensor, "b n c"],
        *,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: KVState | None = None,
    ) -> tuple[
        Float[Tensor, "b hq n d"],
        Float[Tensor, "b hkv n d"],
        Float[Tensor, "b hkv n d"],
        Float[Tensor, "..."] | None,
    ]:
        """Queries, keys and values as the softmax sees them, and the gate."""
        joined = rearrange(self.query(x), "b n (g c) -> b n g c", g=self.kv_heads)
        width = self.heads // self.kv_heads * self.head_dim
        query = rearrange(joined[..., :width], "b n g (h d) -> b (g h) n d", d=self.head_dim)
        key = rearrange(self.key(x), "b n (g d) -> b g n d", d=self.head_dim)
        value = rearrange(self.value(x), "b n (g d) -> b g n d", d=self.head_dim)
        gate = self._gate(x, joined[..., width:])
        if self.gate_position == "query":
            query = self._gated(query, gate)
        elif self.gate_position == "key":
            key = self._gated(key, gate)
        elif self.gate_position == "value":
            value = self._gated(value, gate)
        query, key = _normed(self.query_norm, query), _normed(self.key_norm, key)
        if self.rotary_base is not None:
            angles = next_angles(x, self.head_dim, positions, state, base=self.rotary_base)
            query, key = rotate(query, angles), rotate(key, angles)
        return query, key, value, gate

    def _gate(
        self, x: Float[Tensor, "b n c"], fused: Float[Tensor, "b n g r"]
    ) -> Float[Tensor, "..."] | None:
        """What multiplies the gated tensor, or is added to it; `fused`: the gate's share of `query`."""
        if self.gate_kind is None:
            return None
        if self.gate_kind == "constant":
            logits = self.gate_logits.to(x.dtype)
        elif self.fused:
            logits = rearrange(fused, "b n g (h d) -> b (g h) n d", d=self.fused)
        elif self.gate_position == "final":
            logits = self.gate(x)
        elif self.gate_kind == "shared":
            logits = self.gate(x)[:, None]
        else:
            width = 1 if self.gate_kind == "headwise" else self.head_dim
            logits = rearrange(self.gate(x), "b n (h d) -> b h n d", d=width)
        if self.gate_form in ("silu", "additive"):
            return F.silu(logits)
        return logits.sigmoid() if self.gate_form == "sigmoid" else 0.5 + 0.5 * logits.sigmoid()

    def _gated(self, x: Float[Tensor, "..."], gate: Float[Tensor, "..."] | None) -> Float[Tensor, "..."]:
        assert gate is not None
        return x + gate if self.gate_form == "additive" else x * gate


def _normed(norm: nn.RMSNorm | None, x: Tensor) -> Tensor:
    # Under autocast x is in half precision while the norm's weight is not.
    return x if norm is None else norm(x.to(norm.weight.dtype)).to(x.dtype)
