"""Superlinear attention: a search over few keys, then attention inside the spans it found."""

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
from heedful.mixers.mixer import Mixer
from heedful.mixers.packed import PackedState, Packing
from heedful.ops.attention import attention, merge_partials
from heedful.patterns.causal import Causal
from heedful.patterns.window import Window
from heedful.registry import register
from heedful.routing.jump_search import jump_search, jump_spans
from heedful.routing.spans import span_groups


def superlinear_attention(
    search: Float[Tensor, "b hq n d"],
    query: Float[Tensor, "b hq n d"],
    key: Float[Tensor, "b hkv m d"],
    value: Float[Tensor, "b hkv m e"],
    *,
    spans: int = 3,
    window_index: int = 0,
    power: int = 2,
    backward: float = 2.0,
    forward: float = 0.0,
    span_power: float = 0.5,
    query_offset: int | None = None,
    dropout_p: float = 0.0,
) -> Float[Tensor, "b hq n e"]:
    """sum_j softmax_j(g) Attention(q; span_j and window), g the scores of the best anchors of `jump_search`.

    Each span has a softmax of its own, over its keys and those of the window. Gradients reach `search` and
    key through the scores g, query, key and value through the attention; none passes the choice.
    Arguments as in `SuperlinearAttention`; a query whose spans and window are all empty gives zeros.
    """
    n, m = query.shape[2], key.shape[2]
    offset = m - n if query_offset is None else query_offset
    # 2, 3. The best anchors.
    anchor, score = jump_search(
        search, key, spans=spans, window_index=window_index, power=power, query_offset=offset
    )
    # 4. Their spans.
    first, last = jump_spans(
        anchor,
        window_index=window_index,
        power=power,
        backward=backward,
        forward=forward,
        span_power=span_power,
        query_offset=offset,
    )
    # 5. Attention inside each span; a query stands once for each of its spans.
    part = attention(
        query.repeat_interleave(spans, dim=2),
        key,
        value,
        pattern=span_groups(first.flatten(2), last.flatten(2), m, tile=64, rows=128),
        dropout_p=dropout_p,
        return_lse=window_index > 0,
    )
    if window_index > 0:
        near, near_lse = attention(
            query,
            key,
            value,
            pattern=Causal() & Window((window_index + 1) ** power - 2, 0),
            query_offset=offset,
            dropout_p=dropout_p,
            return_lse=True,
        )
        near, near_lse = near.repeat_interleave(spans, dim=2), near_lse.repeat_interleave(spans, dim=2)
        part, _ = merge_partials([part, (near, near_lse)])  # type: ignore[list-item]
    # 6. Together by the softmax of the scores; equal shares where no anchor is in reach.
    none = (anchor < 0).all(-1, keepdim=True)
    gate = score.masked_fill(none, 0.0).softmax(-1)
    return (part.unflatten(2, (n, spans)) * gate[..., None].to(part.dtype)).sum(3)  # type: ignore[union-attr]


@register(
    "superlinear",
    kind="sequence",
    paper="superlinear",
    tags=("sparse", "softmax", "search"),
    causal="always",
    decode=True,
    complexity="O(N^1.5 C)",
)
class SuperlinearAttention(Mixer):
    """Causal attention of each token to a few spans of about sqrt(t) keys, found by a search among sqrt(t).

        z_i = search_t . k[t - i^power + 1]            the anchors of stripes i = 1, 2, ...
        g_1 .. g_spans = the largest z                  not scaled
        y_t = W_o sum_j softmax_j(g) Attention(q_t; span around anchor j, and the window)

    A span reaches ceil(backward t^span_power) keys back from its anchor and ceil(forward t^span_power) ahead;
    with the defaults the spans that can be chosen cover all that came before. Each span has a softmax of its
    own, scaled by 1 / sqrt(head_dim). The choice passes no gradient; the search learns through softmax(g).

    dim           channels
    heads         query heads, a divisor of `dim`
    kv_heads      key and value heads, a divisor of `heads`; None: as many
    spans         spans a query and head sees
    window_index  s: the last (s + 1)^power - 1 tokens are always seen; 0: no window
    power         how distances of the anchors grow, from 2 to 6; cost O(N^(1 + 1/power)) of the search
    backward, forward, span_power   the length of a span
    qkv_bias      biases in the projections of search, queries, keys and values
    dropout       share of the attention weights dropped in training

    There is no position embedding, as in the authors' host, whose other layers carry order. Distances count
    real tokens: masked ones are left out, and get the output of no context.
    Raises ValueError if heads does not divide dim, kv_heads not heads, power lies outside 2 .. 6,
    window_index is negative, and for a context.
    Source: Superlinear Multi-Step Attention, arXiv 2601.18401.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "kv_heads": 2, "spans": 2, "window_index": 1}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        spans: int = 3,
        window_index: int = 0,
        power: int = 2,
        backward: float = 2.0,
        forward: float = 0.0,
        span_power: float = 0.5,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        kv_heads = heads if kv_heads is None else kv_heads
        check_divides("heads", heads, "dim", dim)
        check_divides("kv_heads", kv_heads, "heads", heads)
        check_positive("spans", spans)
        if window_index < 0:
            raise ValueError(f"window_index is {window_index}, must be at least 0")
        if power not in range(2, 7):
            raise ValueError(f"power is {power!r}, must be a whole number from 2 to 6")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.spans, self.window_index, self.power = spans, window_index, power
        self.backward_factor, self.forward_factor, self.span_power = backward, forward, span_power
        self.dropout = dropout
        width = kv_heads * self.head_dim
        self.search = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.query = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.key = nn.Linear(dim, width, bias=qkv_bias, device=device, dtype=dtype)
        self.value = nn.Linear(dim, width, bias=qkv_bias, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

    def init_state(self, batch: int) -> PackedState:
        """The state before the first token; it keeps all keys and values."""
        return PackedState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: PackedState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], PackedState]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        past = PackedState() if state is None else state
        # 1. Projections, side by side without the padding.
        held = 0 if past.key is None else past.key.shape[2]
        packing = Packing.of(x[..., 0], mask, past.length, past.count, held)
        search, query, key, value = (
            packing.put(rearrange(layer(x), "b n (h d) -> b h n d", d=self.head_dim))
            for layer in (self.search, self.query, self.key, self.value)
        )
        key, value = packing.extend(past.key, key), packing.extend(past.value, value)
        # 2 to 6. Search, and attention inside the spans.
        heads = superlinear_attention(
            search,
            query,
            key,
            value,
            spans=self.spans,
            window_index=self.window_index,
            power=self.power,
            backward=self.backward_factor,
            forward=self.forward_factor,
            span_power=self.span_power,
            query_offset=packing.start,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y = self.out(rearrange(packing.take(heads), "b h n d -> b n (h d)"))
        if state is None:
            return y
        return y, PackedState(past.length + x.shape[1], key, value, packing.count)
