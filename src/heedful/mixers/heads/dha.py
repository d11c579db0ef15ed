"""Decoupled-head attention: query heads share key heads in one way and value heads in another."""

from __future__ import annotations

from collections.abc import Sequence
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
from heedful.mixers.heads.self_attention import next_angles
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.ops.attention import attention
from heedful.ops.rotary import rotate
from heedful.patterns.causal import Causal
from heedful.registry import register


@dataclass(frozen=True)
class DecoupledState(State):
    """Keys and values of all tokens seen, each with its own heads; mask (b, m) once one was given."""

    key: Float[Tensor, "b hk m d"] | None = None
    value: Float[Tensor, "b hv m d"] | None = None
    mask: Bool[Tensor, "b m"] | None = None

    def append(
        self,
        key: Float[Tensor, "b hk n d"],
        value: Float[Tensor, "b hv n d"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> DecoupledState:
        """The state after n more tokens."""
        batch, new = key.shape[0], key.shape[2]
        if mask is not None or self.mask is not None:
            old = self.mask if self.mask is not None else key.new_ones(batch, self.length).bool()
            mask = torch.cat([old, mask if mask is not None else old.new_ones(batch, new)], dim=1)
        if self.key is not None and self.value is not None:
            key = torch.cat([self.key, key], dim=2)
            value = torch.cat([self.value, value], dim=2)
        return DecoupledState(self.length + new, key, value, mask)


@register(
    "dha",
    kind="sequence",
    paper="dha",
    tags=("heads", "softmax", "grouped-query"),
    aliases=("decoupled-head-attention",),
    causal="optional",
    decode=True,
    complexity="O(N^2 C)",
)
class DecoupledHeadAttention(Mixer):
    """Softmax attention with fewer key heads and fewer value heads, each shared by its own groups of queries.

        y = concat_h(softmax(q_h k_K(h)^T / sqrt(d)) v_V(h)) W_o

    K and V are maps from query heads to key heads and to value heads. Equal maps of neighbouring heads are
    grouped-query attention. Nothing has a bias.

    dim          channels
    heads        query heads
    key_heads    number of key heads; None: a quarter of `heads`
    value_heads  number of value heads; None: a quarter of `heads`
    key_map      for each query head its key head, every key head at least once; None: runs of neighbours
    value_map    the same for value heads
    head_dim     channels a head, d; None: dim / heads
    rotary_base  of the rotary embedding (channel j with j + d / 2); None: none
    causal       a token sees itself and what came before; needed to decode
    dropout      share of the attention weights dropped in training

    State: (key_heads + value_heads) d numbers a token, keys rotated. forward: mask (b, n) hides tokens as
    keys. Raises ValueError if heads do not divide or a map does not fit, on wrong shapes, and for a context.
    Source: DHA, arXiv 2406.06567.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 4,
        "key_heads": 2,
        "value_heads": 3,
        "key_map": (0, 1, 1, 0),
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        key_heads: int | None = None,
        value_heads: int | None = None,
        key_map: Sequence[int] | None = None,
        value_map: Sequence[int] | None = None,
        head_dim: int | None = None,
        rotary_base: float | None = 10000.0,
        causal: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("heads", heads)
        if head_dim is None:
            check_divides("heads", heads, "dim", dim)
            head_dim = dim // heads
        check_positive("head_dim", head_dim)
        if rotary_base is not None and head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}, must be even unless rotary_base is None")
        key_heads = max(1, heads // 4) if key_heads is None else key_heads
        value_heads = max(1, heads // 4) if value_heads is None else value_heads
        self.heads, self.key_heads, self.value_heads = heads, key_heads, value_heads
        self.head_dim, self.rotary_base = head_dim, rotary_base
        self.causal, self.dropout = causal, dropout
        self.key_map = _checked_map("key", key_heads, key_map, heads)
        self.value_map = _checked_map("value", value_heads, value_map, heads)
        factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.query = nn.Linear(dim, heads * head_dim, **factory)
        self.key = nn.Linear(dim, key_heads * head_dim, **factory)
        self.value = nn.Linear(dim, value_heads * head_dim, **factory)
        self.out = nn.Linear(heads * head_dim, dim, **factory)

    def init_state(self, batch: int) -> DecoupledState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                "causal is False, must be True to decode: later tokens would change earlier ones"
            )
        return DecoupledState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: DecoupledState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], DecoupledState]:
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
        # Kernels read keys and values in the same groups: each query head gets its own view of both.
        heads = attention(
            query,
            key.index_select(1, torch.tensor(self.key_map, device=x.device)),
            value.index_select(1, torch.tensor(self.value_map, device=x.device)),
            pattern=Causal() if self.causal else None,
            key_mask=seen,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return y if state is None else (y, state)


def _checked_map(name: str, count: int, given: Sequence[int] | None, heads: int) -> list[int]:
    """The head of `count` heads that each query head reads; every one is read."""
    check_positive(f"{name}_heads", count)
    if count > heads:
        raise ValueError(f"{name}_heads is {count}, must be at most heads, which is {heads}")
    if given is None:
        return [h * count // heads for h in range(heads)]
    if len(given) != heads or set(given) != set(range(count)):
        raise ValueError(
            f"{name}_map is {tuple(given)}, must hold for each of {heads} query heads a number from 0 to "
            f"{count - 1}, and every one of them"
        )
    return list(given)
