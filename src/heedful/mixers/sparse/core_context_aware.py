"""Core context aware attention: what lies far back is seen through one pooled token a group."""

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
from heedful.mixers.packed import PackedState, Packing
from heedful.ops.attention import attention
from heedful.ops.rotary import rotary_angles, rotate
from heedful.registry import register
from heedful.routing.core_context import CoreContext, core_tokens


@dataclass(frozen=True)
class CoreState(PackedState):
    """Core tokens so far (b, h, c, d), and the tokens from place `base` on, with their positions (b, m)."""

    base: int = 0
    positions: Shaped[Tensor, "b m"] | None = None
    core_key: Float[Tensor, "b h c d"] | None = None
    core_value: Float[Tensor, "b h c e"] | None = None


@register(
    "core-context-aware",
    kind="sequence",
    paper="core-context-aware",
    tags=("sparse", "softmax", "pooling"),
    causal="always",
    decode=True,
    complexity="O(N (N / G + W) C), groups of G tokens, a window of W",
)
class CoreContextAwareAttention(Mixer):
    """Causal softmax attention over a window of tokens and one core token for each group before it.

        w = softmax over the group (q_last . k / sqrt(d)),  K_i = sum_j w_j k_j,  V_i = sum_j w_j v_j
        y_t = W_o softmax(q_t [K_1..K_J; k_a..k_t]^T / sqrt(d)) [V_1..V_J; v_a..v_t]
        J = max(0, floor((t - window) / group_size)),  a = max(1, J group_size)   (t counts from 1)

    q_last is the query of the group's last token. Weights are each head's own; those of query heads that
    share a KV head are averaged. Queries and keys carry a rotary embedding (channel j pairs with j +
    head_dim / 2); a core key is the sum of keys turned to the position of the group's last token.

    dim         channels
    heads       query heads, a divisor of `dim`
    kv_heads    key and value heads, a divisor of `heads`; None: as many
    group_size  tokens a core token stands for
    window      tokens seen one by one, at least; the window reaches back to the border of a group
    overlap     as published the last token of the nearest core's group is in the window too; False: it is not
    qkv_bias    biases in the projections of queries, keys and values
    dropout     share of the attention weights dropped in training

    There is no weight that a dense layer has not: a pretrained one's load unchanged. Groups count real
    tokens: masked ones belong to none, and get the output of no context. Sequences up to `window` tokens are
    exact.
    Raises ValueError if heads does not divide dim into even widths, kv_heads not heads, and for a
    context.
    Source: Core Context Aware Transformers, arXiv 2412.12465.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "kv_heads": 2, "group_size": 3, "window": 5}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        group_size: int = 16,
        window: int = 1024,
        overlap: bool = True,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        kv_heads = heads if kv_heads is None else kv_heads
        check_divides("heads", heads, "dim", dim)
        check_divides("kv_heads", kv_heads, "heads", heads)
        check_positive("group_size", group_size)
        check_positive("window", window)
        if dim // heads % 2:
            raise ValueError(f"dim / heads is {dim // heads}, must be even for the rotary embedding")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.group_size, self.window, self.overlap, self.dropout = group_size, window, overlap, dropout
        width = kv_heads * self.head_dim
        self.query = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.key = nn.Linear(dim, width, bias=qkv_bias, device=device, dtype=dtype)
        self.value = nn.Linear(dim, width, bias=qkv_bias, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

    def init_state(self, batch: int) -> CoreState:
        """The state before the first token; it keeps the window and a core token for each group."""
        return CoreState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: CoreState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], CoreState]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        past = CoreState() if state is None else state
        if positions is None:
            positions = torch.arange(past.length, past.length + x.shape[1], device=x.device)
        positions = positions.expand(x.shape[:2])
        # 1. Queries, keys and values, side by side without the padding.
        query, key, value = (
            rearrange(layer(x), "b n (h d) -> b h n d", d=self.head_dim)
            for layer in (self.query, self.key, self.value)
        )
        angles = rotary_angles(positions, self.head_dim, dtype=x.dtype)
        query, key = rotate(query, angles), rotate(key, angles)
        held = 0 if past.key is None else past.base + past.key.shape[2]
        packing = Packing.of(positions, mask, past.length, past.count, held)
        query = packing.put(query)
        key = packing.extend(past.key, packing.put(key), past.base)
        value = packing.extend(past.value, packing.put(value), past.base)
        seen = None if past.positions is None else past.positions[:, None, :, None]
        place = packing.extend(seen, packing.put(positions[:, None, :, None]), past.base)[:, 0, :, 0]
        # 2, 3. Core tokens of the groups that the call completes.
        core_key, core_value = self._cores(past, packing, query, key, value, place)
        # 4, 5. One softmax over core tokens and window.
        pattern = CoreContext(core_key.shape[2], self.group_size, self.window, self.overlap, past.base)
        heads = attention(
            query,
            torch.cat([core_key, key], dim=2),
            torch.cat([core_value, value], dim=2),
            pattern=pattern,
            query_offset=packing.start,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y = self.out(rearrange(packing.take(heads), "b h n d -> b n (h d)"))
        if state is None:
            return y
        base = self._base(packing)
        cut = base - past.base
        return y, CoreState(
            past.length + x.shape[1],
            key[:, :, cut:],
            value[:, :, cut:],
            packing.count,
            base,
            place[:, cut:],
            core_key,
            core_value,
        )

    def _cores(
        self,
        past: CoreState,
        packing: Packing,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b hkv m d"],
        value: Float[Tensor, "b hkv m d"],
        positions: Shaped[Tensor, "b m"],
    ) -> tuple[Float[Tensor, "b hkv c d"], Float[Tensor, "b hkv c d"]]:
        """All core tokens: those of the past, and those of groups whose last token is among the queries."""
        size = self.group_size
        first, last = packing.start // size, packing.stop // size
        inside = slice(first * size - past.base, last * size - past.base)
        key, value, place = key[:, :, inside], value[:, :, inside], positions[:, inside]
        ends = place.unflatten(1, (-1, size))[..., -1:] if last > first else place[:, None, :0]
        ahead = (ends - place.unflatten(1, (-1, size))).flatten(1) if last > first else place
        turned = rotate(key, rotary_angles(ahead, self.head_dim, dtype=key.dtype))
        final = query[:, :, (first + 1) * size - 1 - packing.start :: size]
        cores = core_tokens(final, key, value, turned=turned)
        if packing.before is not None and packing.count is not None:
            # A row gets the core tokens of the groups that it completes in this call.
            number = torch.arange(first, last, device=key.device)
            new = (number >= packing.before[:, None] // size) & (number < packing.count[:, None] // size)
            cores = tuple(c * new[:, None, :, None] for c in cores)  # type: ignore[assignment]
        groups = Packing(first, last, packing.place)
        return groups.extend(past.core_key, cores[0]), groups.extend(past.core_value, cores[1])

    def _base(self, packing: Packing) -> int:
        """The first place that a later query can see, in any row."""
        fewest = packing.stop
        if packing.count is not None:
            fewest = int(packing.count.min()) if len(packing.count) else 0
        cores = max(0, (fewest + 1 - self.window) // self.group_size)
        return max(0, cores * self.group_size - int(self.overlap))
