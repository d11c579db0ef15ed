"""Relative convolutional multi-head attention: short causal convolutions, and learned relative positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heedful.checks import check_divides, check_mask, check_positions, check_positive, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import KVState
from heedful.ops.attention import attention
from heedful.patterns.causal import Causal
from heedful.registry import register

KERNEL = 3  # width of the convolutions, the token's own place included
ROWS = 512  # queries whose position terms are held at a time


@dataclass(frozen=True)
class RCMHAState(KVState):
    """Keys and values of all tokens seen, and the last two projections before each convolution."""

    query_tail: Float[Tensor, "b h 2 d"] | None = None
    key_tail: Float[Tensor, "b h 2 d"] | None = None
    value_tail: Float[Tensor, "b h 2 d"] | None = None


@register(
    "rcmha",
    kind="sequence",
    paper="rcmha",
    tags=("heads", "softmax", "convolution", "relative-positions"),
    aliases=("relative-conv-attention",),
    causal="optional",
    cross=True,
    decode=True,
    complexity="O(N^2 C)",
)
class RelativeConvMultiHeadAttention(Mixer):
    """Multi-head attention whose q, k, v pass a causal convolution, with learned relative positions.

        z_t = b + w0 z'_(t-2) + w1 z'_(t-1) + w2 z'_t   for z = q, k, v, channel by channel of a head
        s_ij = ((q_i + u) k_j + q_i E[P + r] + c[P + r]) / sqrt(d),  r = j - (m - n) - i
        y = concat_h(softmax(s) v) W_o

    The heads share the filters w, b of q, of k and of v; u, E and c are of each head. W_q and W_k have no
    bias. Before the first token the convolutions see zeros.

    dim         channels
    heads       heads, a divisor of dim; d = dim / heads
    max_length  P: the most keys, and half the rows of E and c, which start at zero
    causal      a token sees itself and what came before; needed to decode
    dropout     share of the attention weights dropped in training

    forward: context (b, m) is where keys and values come from; it ends where x ends, as a memory followed by
    x does, and `causal` and r hold in it; queries are convolved within x alone. mask (b, n) and context_mask
    (b, m) hide keys; to the convolutions masked tokens are the zeros before a sequence. `positions` have no
    effect: r alone counts.
    Raises ValueError on wrong shapes, for more tokens than max_length, and for a state with a context.
    Source: RCMHA, arXiv 2308.03429; convolutions of Primer, arXiv 2109.08668.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "max_length": 80}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        max_length: int = 4096,
        causal: bool = True,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("max_length", max_length)
        self.heads, self.head_dim, self.max_length = heads, dim // heads, max_length
        self.causal, self.dropout = causal, dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, dim, bias=False, **factory)
        self.key = nn.Linear(dim, dim, bias=False, **factory)
        self.value = nn.Linear(dim, dim, **factory)
        d = self.head_dim
        self.query_conv = nn.Conv1d(d, d, KERNEL, groups=d, **factory)
        self.key_conv = nn.Conv1d(d, d, KERNEL, groups=d, **factory)
        self.value_conv = nn.Conv1d(d, d, KERNEL, groups=d, **factory)
        self.position = nn.Parameter(torch.zeros(2 * max_length, heads, d, **factory))  # E
        self.position_bias = nn.Parameter(torch.zeros(2 * max_length, heads, **factory))  # c
        self.query_bias = nn.Parameter(torch.zeros(heads, d, **factory))  # u
        self.out = nn.Linear(dim, dim, **factory)

    def init_state(self, batch: int) -> RCMHAState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                "causal is False, must be True to decode: later tokens would change earlier ones"
            )
        return RCMHAState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: RCMHAState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], RCMHAState]:
        source = self._door(x, context, mask, context_mask, positions, state)
        seen = mask if context is None else context_mask
        # 1., 2. Projections, heads, convolutions over time.
        before = RCMHAState() if state is None else state
        query, query_tail = self.convolve(self.query(x), self.query_conv, before.query_tail, mask)
        key, key_tail = self.convolve(self.key(source), self.key_conv, before.key_tail, seen)
        value, value_tail = self.convolve(self.value(source), self.value_conv, before.value_tail, seen)
        if state is not None:
            kept = state.append(key, value, mask)
            assert kept.key is not None
            assert kept.value is not None
            key, value, seen = kept.key, kept.value, kept.mask
            state = RCMHAState(kept.length, key, value, seen, query_tail, key_tail, value_tail)
        # 3., 4. Relative attention and the output projection.
        heads = self.attend(query, key, value, mask=seen)
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return y if state is None else (y, state)

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h m d"],
        value: Float[Tensor, "b h m e"],
        *,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax of the scores, on convolved queries, keys and values; some rows at a time."""
        n, m = query.shape[2], key.shape[2]
        again = n > ROWS and torch.is_grad_enabled()
        parts = []
        for start in range(0, max(n, 1), ROWS):
            rows = query[:, :, start : start + ROWS]
            arguments = (rows, key, value, mask, m - n + start)
            # The position terms of all rows at once would be an n x m table for each head.
            parts.append(
                checkpoint(self._rows, *arguments, use_reentrant=False) if again else self._rows(*arguments)
            )
        return torch.cat(parts, dim=2)

    def _rows(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, offset: int
    ) -> Float[Tensor, "b h n e"]:
        """Attention of neighbouring queries, the first of which stands at key position `offset`."""
        n, m = query.shape[2], key.shape[2]
        scale = self.head_dim**-0.5
        # Table rows for r from -offset - n, one below what is needed, to m - 1 - offset.
        first = self.max_length - offset - n
        table = self.position[first : first + n + m].to(query.dtype)
        bias = self.position_bias[first : first + n + m].to(query.dtype)
        terms = torch.einsum("bhnd,rhd->bhnr", query, table) + bias.T[:, None]
        return attention(
            query + self.query_bias[:, None].to(query.dtype),
            key,
            value,
            pattern=Causal() if self.causal else None,
            bias=_shifted(terms)[..., :m] * scale,
            scale=scale,
            key_mask=mask,
            query_offset=offset,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def convolve(
        self, projected: Tensor, conv: nn.Conv1d, tail: Tensor | None, seen: Tensor | None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h 2 d"]]:
        """Heads after the convolution, and its last two inputs."""
        if seen is not None:
            projected = projected.masked_fill(~seen[..., None], 0.0)
        z = rearrange(projected, "b n (h d) -> b h n d", h=self.heads)
        if tail is None:
            tail = z.new_zeros(*z.shape[:2], KERNEL - 1, self.head_dim)
        z = torch.cat([tail, z], dim=2)
        n = projected.shape[1]
        out = z[:, :, :0]
        if n:
            out = rearrange(conv(rearrange(z, "b h n d -> (b h) d n")), "(b h) d n -> b h n d", h=self.heads)
        return out, z[:, :, n:]

    def _door(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        context_mask: Tensor | None,
        positions: Tensor | None,
        state: RCMHAState | None,
    ) -> Tensor:
        """Check the arguments; give back where keys and values come from."""
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        length = x.shape[1] + (0 if state is None else state.length)
        if length > self.max_length:
            raise ValueError(
                f"x makes a sequence of {length} tokens, must be at most max_length, {self.max_length}"
            )
        if context is None:
            if context_mask is not None:
                raise ValueError("context_mask is given, must come with a context")
            return x
        check_tokens("context", context, self.dim)
        check_mask("context_mask", context_mask, context.shape[0], context.shape[1])
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context has batch {context.shape[0]}, must be {x.shape[0]}, that of x")
        if context.shape[1] > self.max_length:
            raise ValueError(
                f"context has {context.shape[1]} tokens, must be at most max_length, {self.max_length}"
            )
        if state is not None:
            raise ValueError("state is given, must be None with a context: a state is of self-attention")
        return context


def _shifted(terms: Float[Tensor, "b h n r"]) -> Float[Tensor, "b h n r1"]:
    """Row i moved to the left by n - i, r1 = r - 1: from a column a relative offset to one a key."""
    n, width = terms.shape[2:]
    # A row ends one number earlier than before, so each begins one further to the left than the last.
    return terms.flatten(2)[..., n:].unflatten(-1, (n, width - 1)) if n else terms[..., :-1]
