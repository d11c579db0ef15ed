"""Dynamic mask attention: values say how much their key is worth keeping, and each query keeps the best."""

from __future__ import annotations

from dataclasses import dataclass
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
from heedful.routing.dynamic_mask import global_topk, running_topk

BIASES = ("exp", "linear")
SELECTIONS = ("row", "global")


@dataclass(frozen=True)
class DynamicMaskState(KVState):
    """Rotated keys, values, and the score (b, kv heads, m) of every key."""

    score: Float[Tensor, "b hkv m"] | None = None


@register(
    "dynamic-mask-attention",
    kind="sequence",
    paper="dynamic-mask-attention",
    tags=("sparse", "softmax", "mask", "routing"),
    aliases=("dma",),
    causal="always",
    decode=True,
    complexity="O(N W C)",
)
class DynamicMaskAttention(Mixer):
    """Causal attention to the `window` keys that their values rate highest, the rating added to the logits.

        s = exp(A softplus(W_dt v))                          one number a key and KV head
        o_i = softmax over the `window` keys j <= i with the largest s_j of (q_i . k_j / sqrt(d) + s_j) v_j

    W_dt reads the values of all KV heads together. Queries and keys have an RMS norm over the head and then a
    rotary embedding. The choice of keys passes no gradient; s does, as a bias on the keys that are kept.
    A starts at 0: all keys are worth the same, and of equal keys the latest are kept, a sliding window.

    dim          channels
    heads        query heads
    kv_heads     key and value heads, a divisor of `heads`; None: as many as `heads`
    head_dim     channels a head, even; None: dim / heads
    window       keys that a query keeps
    bias         "exp": s as above, as in the released models. "linear": s = A softplus(W_dt v)
    topk         "row": as above. "global": the best keys of the whole sequence, as in the authors' kernel;
                 the choice then sees the future, the attribute `causal` is False, the mixer does not decode
    rotary_base  of the rotary embedding (channel j pairs with j + head_dim / 2)
    qkv_bias     biases in every projection, W_dt and W_o among them
    dropout      share of the attention weights dropped in training

    forward: mask (b, n) hides tokens, which then take no place in the window; positions (n) or (b, n) are for
    the rotary embedding and continue from the state by default.
    Raises ValueError if heads do not divide, on unknown names, and for a context.
    Source: Trainable Dynamic Mask Sparse Attention, arXiv 2508.02124; the module of the Doge models.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "kv_heads": 2, "window": 5}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 2048,
        bias: str = "exp",
        topk: str = "row",
        rotary_base: float = 10000.0,
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
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}, must be even for the rotary embedding")
        check_positive("window", window)
        check_choice("bias", bias, BIASES)
        check_choice("topk", topk, SELECTIONS)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.window, self.bias, self.topk = window, bias, topk
        self.causal = topk == "row"
        self.rotary_base, self.dropout = rotary_base, dropout

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=qkv_bias, device=device, dtype=dtype)

        self.query = linear(dim, heads * head_dim)
        self.key = linear(dim, kv_heads * head_dim)
        self.value = linear(dim, kv_heads * head_dim)
        self.out = linear(heads * head_dim, dim)
        self.worth = linear(kv_heads * head_dim, kv_heads)
        self.gain = nn.Parameter(torch.zeros(kv_heads, device=device, dtype=dtype))
        self.query_norm = nn.RMSNorm(head_dim, eps=1e-6, device=device, dtype=dtype)
        self.key_norm = nn.RMSNorm(head_dim, eps=1e-6, device=device, dtype=dtype)

    def init_state(self, batch: int) -> DynamicMaskState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError("topk is 'global', must be 'row' to decode: keys compete with later ones")
        return DynamicMaskState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: DynamicMaskState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], DynamicMaskState]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if state is not None and not self.causal:
            raise ValueError("state is given, must be None: with topk='global' this mixer does not decode")
        # 1 to 3. Queries, keys and values, and what each key is worth.
        angles = next_angles(x, self.head_dim, positions, state, base=self.rotary_base)
        query, key, value = self.project(x, angles)
        score, seen = self.scores(value), mask
        if state is not None:
            old, kv = state, state.append(key, value, mask)
            if old.score is not None:
                score = torch.cat([old.score, score], dim=2)
            state = DynamicMaskState(kv.length, kv.key, kv.value, kv.mask, score)
            assert kv.key is not None
            assert kv.value is not None
            key, value, seen = kv.key, kv.value, kv.mask
        # 4 to 7. The best keys of each row, and attention with the scores as a bias.
        y = self.out(rearrange(self.attend(query, key, value, score, seen), "b h n d -> b n (h d)"))
        return y if state is None else (y, state)

    def project(
        self,
        x: Float[Tensor, "b n c"],
        angles: Float[Tensor, "..."] | tuple[Float[Tensor, "..."], Float[Tensor, "..."]],
    ) -> tuple[Float[Tensor, "b hq n d"], Float[Tensor, "b hkv n d"], Float[Tensor, "b hkv n d"]]:
        """Normalised and turned queries and keys, and values."""
        query, key, value = (
            rearrange(layer(x), "b n (h d) -> b h n d", d=self.head_dim)
            for layer in (self.query, self.key, self.value)
        )
        query, key = _normed(self.query_norm, query), _normed(self.key_norm, key)
        return rotate(query, angles), rotate(key, angles), value

    def scores(self, value: Float[Tensor, "b hkv n d"]) -> Float[Tensor, "b hkv n"]:
        """What the keys of these values are worth, in float32 at least."""
        wide = torch.promote_types(value.dtype, torch.float32)
        worth = self.worth(rearrange(value, "b h n d -> b n (h d)")).to(wide).mT
        # softplus; torch.compile takes the strides of F.softplus's gradient for others than they are.
        positive = torch.logaddexp(worth, worth.new_zeros(()))
        score = self.gain.to(wide)[:, None] * positive
        return score.exp() if self.bias == "exp" else score

    def attend(
        self,
        query: Float[Tensor, "b hq n d"],
        key: Float[Tensor, "b hkv m d"],
        value: Float[Tensor, "b hkv m e"],
        score: Float[Tensor, "b hkv m"],
        key_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b hq n e"]:
        """Attention of each query to the keys it keeps; a query that sees nothing gives zeros."""
        n, m = query.shape[2], key.shape[2]
        # The score enters the logits as one more channel, so that query heads go on sharing their keys.
        scale = self.head_dim**-0.5
        ones = torch.full_like(query[..., :1], 1 / scale)
        spare = (0, -(self.head_dim + 1) % 8)  # widths that are multiples of 8 suit fused kernels
        query = F.pad(torch.cat([query, ones], dim=-1), spare)
        key = F.pad(torch.cat([key, score[..., None].to(key.dtype)], dim=-1), spare)
        dropout = self.dropout if self.training else 0.0
        if m <= self.window:
            return attention(
                query, key, value, pattern=Causal(), scale=scale, key_mask=key_mask, dropout_p=dropout
            )
        score = score.repeat_interleave(self.heads // self.kv_heads, dim=1)
        if self.topk == "row":
            sees = running_topk(score, self.window, queries=n, key_mask=key_mask)
        else:
            sees = global_topk(score, self.window, key_mask=key_mask)
        return attention(query, key, value, pattern=sees, scale=scale, key_mask=key_mask, dropout_p=dropout)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    # Under autocast x is in half precision while the norm's weight is not.
    return norm(x.to(norm.weight.dtype)).to(x.dtype)
