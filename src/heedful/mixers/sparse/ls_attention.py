"""Long-short attention: some heads see what is near, the others everything."""

from __future__ import annotations

from dataclasses import dataclass
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
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.ops.attention import attention
from heedful.ops.rotary import rotary_angles, rotate
from heedful.patterns.causal import Causal
from heedful.patterns.full import Full
from heedful.patterns.per_head import PerHead
from heedful.patterns.window import Window
from heedful.registry import register


@dataclass(frozen=True)
class LongShortState(State):
    """All keys and values of the global heads, and those of the window of the local ones."""

    key: Float[Tensor, "b g m d"] | None = None
    value: Float[Tensor, "b g m d"] | None = None
    local_key: Float[Tensor, "b s w d"] | None = None
    local_value: Float[Tensor, "b s w d"] | None = None
    mask: Bool[Tensor, "b m"] | None = None  # of all tokens, once one was given


@register(
    "ls-attention",
    kind="sequence",
    paper="ls-attention",
    tags=("sparse", "softmax", "window", "heads"),
    aliases=("long-short-attention",),
    causal="optional",
    decode=True,
    complexity="O((local_heads window N + global_heads N^2) C / heads)",
)
class LongShortAttention(Mixer):
    """Softmax attention whose first heads see a window and whose other heads see everything.

        logits_h = q_h k_h^T / sqrt(d) where visible,  y = concat_h(softmax(logits_h) v_h) W_o
        local heads (the first ones): 0 <= i - j < window;  global heads: j <= i

    The weights are those of plain attention.

    local_heads  how many heads are local; None: half of them
    window       keys of a local head, the query's own counted
    causal       False: |i - j| < window in local heads and everything in global ones
    rotary       rotary position embedding on queries and keys (channel j pairs with j + d / 2)
    qkv_bias     biases in W_q, W_k, W_v; W_o always has one
    dropout      share of the attention weights dropped in training

    `pattern` says the same for `heedful.attention`. A state holds the last window - 1 keys of local heads
    and all keys of global ones. Raises ValueError if heads do not divide dim, and for a context.
    Source: Short-Range Dependency Effects on Transformer Instability, arXiv 2505.15548. (Not
    Transformer-LS, arXiv 2107.02192.)
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "window": 3, "rotary": True}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        local_heads: int | None = None,
        window: int = 64,
        causal: bool = True,
        rotary: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("window", window)
        local_heads = heads // 2 if local_heads is None else local_heads
        if not 0 <= local_heads <= heads:
            raise ValueError(f"local_heads is {local_heads}, must lie between 0 and heads, which is {heads}")
        if rotary and dim // heads % 2:
            raise ValueError(f"dim / heads is {dim // heads}, must be even for rotary=True")
        self.heads, self.local_heads, self.head_dim = heads, local_heads, dim // heads
        self.causal, self.rotary, self.window, self.dropout = causal, rotary, window, dropout
        self.near = Window(window - 1, 0) if causal else Window(window - 1)
        self.far = Causal() if causal else Full()
        self.query = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.key = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.value = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)

    @property
    def pattern(self) -> PerHead:
        """Who sees whom, head by head."""
        return PerHead([self.near] * self.local_heads + [self.far] * (self.heads - self.local_heads))

    def init_state(self, batch: int) -> LongShortState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                "causal is False, must be True to decode: later tokens would change earlier ones"
            )
        return LongShortState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: LongShortState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], LongShortState]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        start = 0 if state is None else state.length
        # 1. Queries, keys and values of all heads.
        query, key, value = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads)
            for y in (self.query(x), self.key(x), self.value(x))
        )
        if self.rotary:
            if positions is None:
                positions = torch.arange(start, start + x.shape[1], device=x.device)
            angles = rotary_angles(positions, self.head_dim, dtype=x.dtype)
            query, key = (rotate(y, angles) for y in (query, key))
        s = self.local_heads
        keys, values = [key[:, :s], key[:, s:]], [value[:, :s], value[:, s:]]
        if state is not None:
            held = ((state.local_key, state.local_value), (state.key, state.value))
            for i, (old_key, old_value) in enumerate(held):
                if old_key is not None and old_value is not None:
                    keys[i] = torch.cat([old_key, keys[i]], 2)
                    values[i] = torch.cat([old_value, values[i]], 2)
            if mask is not None or state.mask is not None:
                before = state.mask if state.mask is not None else x.new_ones(len(x), start, dtype=torch.bool)
                now = mask if mask is not None else before.new_ones(len(x), x.shape[1])
                mask = torch.cat([before, now], 1)
        # 2, 3. Local heads first; each kind of head is one call.
        dropout = self.dropout if self.training else 0.0
        parts = []
        for q, k, v, pattern in zip(
            (query[:, :s], query[:, s:]), keys, values, (self.near, self.far), strict=True
        ):
            if q.shape[1]:
                seen = None if mask is None else mask[:, mask.shape[1] - k.shape[2] :]
                parts.append(attention(q, k, v, pattern=pattern, key_mask=seen, dropout_p=dropout))
        y = self.out(rearrange(torch.cat(parts, 1), "b h n d -> b n (h d)"))
        if state is None:
            return y
        oldest = max(0, keys[0].shape[2] - (self.window - 1))
        after = LongShortState(
            start + x.shape[1], keys[1], values[1], keys[0][:, :, oldest:], values[0][:, :, oldest:], mask
        )
        return y, after
