"""StreamingLLM: the first tokens and the last, at their places in the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from heedful.checks import check_no_context
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.state import KVState
from heedful.ops.attention import attention, merge_partials
from heedful.ops.rotary import rotary_angles, rotate
from heedful.patterns.causal import Causal
from heedful.patterns.pattern import Pattern
from heedful.patterns.sink_window import SinkWindow
from heedful.patterns.window import Window
from heedful.registry import register


@register(
    "streaming-llm",
    kind="sequence",
    paper="streaming-llm",
    tags=("sparse", "softmax", "window", "sink"),
    causal="always",
    decode=True,
    complexity="O(N (sinks + window) C)",
)
class StreamingAttention(SelfAttention):
    """Causal softmax attention over the first `sinks` tokens and the last `window`, in constant memory.

        y = concat_h(softmax(q_h k_g^T / sqrt(d) over the keys that SinkWindow shows) v_g) W_o

    With the rotary embedding, positions are places in the cache: once tokens have left it, the sinks stand
    right before the window, so no query ever meets a distance of sinks + window or more. Distances inside
    the window are the true ones.

    sinks   first tokens that stay; 0 is plain window attention
    window  keys of the window, the query's own counted. The authors' loop, which drops tokens after each
            step, has window = recent_size + 1
    The other arguments, and those of forward, are those of `SelfAttention`; positions count from the first
    token of the text.

    A state holds sinks + window - 1 keys however long the text is. Raises ValueError if heads do not divide,
    and for a context. Source: StreamingLLM, arXiv 2309.17453.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 4,
        "kv_heads": 2,
        "sinks": 2,
        "window": 4,
        "rotary": True,
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        sinks: int = 4,
        window: int = 1021,
        rotary: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            causal=True,
            rotary=rotary,
            qkv_bias=qkv_bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.pattern = SinkWindow(sinks, window)
        self.sinks, self.window = sinks, window

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
        check_no_context(context, context_mask)
        self._door(x, None, mask, None, positions, None)
        start, new = (0 if state is None else state.length), x.shape[1]
        query, key, value = (
            rearrange(y, "b n (h d) -> b h n d", d=self.head_dim)
            for y in (self.query(x), self.key(x), self.value(x))
        )
        far = query
        if self.rotary:
            if positions is None:
                positions = torch.arange(start, start + new, device=x.device)
            slots = positions.clamp(max=self.sinks + self.window - 1)
            true, slot = (rotary_angles(p, self.head_dim, dtype=x.dtype) for p in (positions, slots))
            query, key, far = rotate(query, true), rotate(key, true), rotate(far, slot)
        held = state or KVState()
        rows = 0 if held.key is None else held.key.shape[2]
        joined = replace(held, length=rows).append(key, value, mask)
        heads = self._attend(query, far, joined, start, new)
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return y if state is None else (y, self._evict(joined, start + new))

    def _attend(self, query: Tensor, far: Tensor, held: KVState, start: int, new: int) -> Tensor:
        """Over the window with `query`, and over the sinks that have left the window with `far`."""
        assert held.key is not None

        def part(q: Tensor, keys: slice, pattern: Pattern | None, offset: int, **wanted: bool) -> Any:
            assert held.key is not None and held.value is not None
            return attention(
                q,
                held.key[:, :, keys],
                held.value[:, :, keys],
                pattern=pattern,
                key_mask=None if held.mask is None else held.mask[:, keys],
                query_offset=offset,
                dropout_p=self.dropout if self.training else 0.0,
                **wanted,
            )

        if start == 0 and far is query:  # nothing was dropped, and no query stands in two places
            return part(query, slice(None), self.pattern, 0)
        near = min(start, self.window - 1)  # keys before the new ones
        window = query, slice(held.key.shape[2] - near - new, None), Window(self.window - 1, 0), near
        if not self.sinks or start + new <= self.window:
            return part(*window)
        # The query at position i has sink j out of its window iff j <= i - window.
        sinks = far, slice(0, self.sinks), Causal(), start - self.window
        return merge_partials([part(*keys, return_lse=True) for keys in (window, sinks)])[0]

    def _evict(self, held: KVState, length: int) -> KVState:
        """The first `sinks` and the last window - 1 tokens."""
        assert held.key is not None and held.value is not None
        rows = held.key.shape[2]
        last = max(self.sinks, rows - (self.window - 1))
        if last == self.sinks:
            return replace(held, length=length)
        key, value = (torch.cat([x[:, :, : self.sinks], x[:, :, last:]], 2) for x in (held.key, held.value))
        mask = held.mask
        if mask is not None:
            mask = torch.cat([mask[:, : self.sinks], mask[:, last:]], 1)
        return KVState(length, key, value, mask)
