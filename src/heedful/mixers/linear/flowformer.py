"""Flow attention of Flowformer: linear attention in which sources compete and sinks are gated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import check_divides, check_mask, check_positions, check_positive, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.ops.flow import FlowState, flow_attention
from heedful.registry import register


@dataclass(frozen=True)
class FlowAttentionState(State):
    """The sums of `heedful.ops.flow.FlowState`; float32 or float64, None before the first token."""

    number: Float[Tensor, " b"] | None = None
    query: Float[Tensor, "b h d"] | None = None
    key: Float[Tensor, "b h d"] | None = None
    incoming: Float[Tensor, "b h d"] | None = None
    outgoing: Float[Tensor, "b h d"] | None = None
    competition: Float[Tensor, "b h"] | None = None
    matrix: Float[Tensor, "b h d d"] | None = None


@register(
    "flowformer",
    kind="sequence",
    paper="flowformer",
    tags=("linear",),
    causal="optional",
    cross=True,
    decode=True,
    complexity="O(N C^2)",
)
class FlowAttention(Mixer):
    """Linear attention that conserves flow: sources (values) compete, sinks (results) are gated.

        q, k, v = x W_q, s W_k, s W_v in heads,  o = flow_attention(q, k, v),  y = dropout(concat_h(o) W_o)

    s is the context if there is one, else x; the formulas stand in `heedful.ops.flow.flow_attention`.

    dim       channels of x, of the context and of y
    heads     heads
    head_dim  channels a head; None: dim / heads
    causal    all sums are over the tokens so far; needed to decode
    dropout   share of the outputs dropped in training, behind W_o
    eps       added to features and sums before each dot product

    forward: mask (b, n) takes tokens of x out of all sums, as sinks and as sources; context_mask (b, m) those
    of the context. With a context `causal` does not act; `positions` have no effect.
    State: the sums, head_dim + 4 vectors a head and two numbers, whatever the length.
    Raises ValueError if heads do not divide, on wrong shapes, and where a state comes with a context.
    Source: Flowformer, arXiv 2202.06258; the authors' Flow_Attention.py.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        dropout: float = 0.05,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("heads", heads)
        if head_dim is None:
            check_divides("heads", heads, "dim", dim)
            head_dim = dim // heads
        check_positive("head_dim", head_dim)
        self.heads, self.head_dim = heads, head_dim
        self.causal, self.dropout, self.eps = causal, dropout, eps
        self.query = nn.Linear(dim, heads * head_dim, device=device, dtype=dtype)
        self.key = nn.Linear(dim, heads * head_dim, device=device, dtype=dtype)
        self.value = nn.Linear(dim, heads * head_dim, device=device, dtype=dtype)
        self.out = nn.Linear(heads * head_dim, dim, device=device, dtype=dtype)

    def init_state(self, batch: int) -> FlowAttentionState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                "causal is False, must be True to decode: later tokens would change earlier ones"
            )
        return FlowAttentionState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: FlowAttentionState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], FlowAttentionState]:
        source = self._door(x, context, mask, context_mask, positions, state)
        query, key, value = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads)
            for y in (self.query(x), self.key(source), self.value(source))
        )
        after = None
        if context is not None:
            heads = flow_attention(query, key, value, query_mask=mask, key_mask=context_mask, eps=self.eps)
        elif self.causal:
            heads, after = flow_attention(
                query,
                key,
                value,
                causal=True,
                key_mask=mask,
                eps=self.eps,
                state=_sums(state),
                return_state=True,
            )
        else:
            heads = flow_attention(query, key, value, query_mask=mask, key_mask=mask, eps=self.eps)
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        y = F.dropout(y, self.dropout, self.training)
        if state is None or after is None:
            return y
        return y, FlowAttentionState(state.length + x.shape[1], *after)

    def _door(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        context_mask: Tensor | None,
        positions: Tensor | None,
        state: State | None,
    ) -> Tensor:
        """Check the arguments; give back where keys and values come from."""
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if state is not None and (context is not None or not self.causal):
            raise ValueError("state is given, must be None with a context or with causal=False")
        if context is None:
            if context_mask is not None:
                raise ValueError("context_mask is given, must come with a context")
            return x
        check_tokens("context", context, self.dim)
        check_mask("context_mask", context_mask, context.shape[0], context.shape[1])
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context has batch {context.shape[0]}, must be {x.shape[0]}, that of x")
        return context


def _sums(state: FlowAttentionState | None) -> FlowState | None:
    if state is None or state.number is None:
        return None
    return FlowState(*(getattr(state, name) for name in FlowState._fields))
