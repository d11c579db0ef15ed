"""Aaren: softmax attention of one learned query, updated token by token in constant memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
from heedful.ops.softmax_scan import SoftmaxState, softmax_prefix_scan
from heedful.registry import register


@dataclass(frozen=True)
class AarenState(State):
    """Greatest score, denominator and numerator of every head; float32 or float64."""

    maximum: Float[Tensor, "b h"] | None = None
    total: Float[Tensor, "b h"] | None = None
    weighted: Float[Tensor, "b h e"] | None = None


@register(
    "aaren",
    kind="sequence",
    paper="aaren",
    tags=("linear", "softmax", "recurrent"),
    causal="always",
    decode=True,
    complexity="O(N C^2)",
)
class Aaren(Mixer):
    """Softmax attention over all tokens so far, of a query that is learned and the same for every token.

        Q = q W_q,  k = x W_k,  v = x W_v;  s_j = Q_h . k_jh / sqrt(d)
        y_i = W_o concat_h(sum_(j <= i) exp(s_jh) v_jh / sum_(j <= i) exp(s_jh))

    Because the query does not depend on the token, all prefixes come from one scan, and a new token
    updates three quantities a head. 4 (dim^2 + dim) + dim parameters: one vector q more than self-attention.

    dim    channels
    heads  a divisor of dim

    Masked tokens have s = -inf; a token that has seen nothing gives the bias of W_o. `positions` have no
    effect.
    State: greatest score, denominator and numerator, dim + 2 heads numbers whatever the length.
    Raises ValueError if heads does not divide dim, on wrong shapes, or if a context is given.
    Source: Attention as an RNN, arXiv 2405.13956.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        self.token = nn.Parameter(torch.empty(dim, device=device, dtype=dtype).normal_(std=dim**-0.5))
        self.query = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.key = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.value = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)

    def init_state(self, batch: int) -> AarenState:
        """The state before the first token of `batch` sequences."""
        wide = torch.promote_types(self.token.dtype, torch.float32)
        zeros = self.token.new_zeros(batch, self.heads, 1 + self.dim // self.heads, dtype=wide)
        return AarenState(0, torch.full_like(zeros[..., 0], -torch.inf), zeros[..., 0], zeros[..., 1:])

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: AarenState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], AarenState]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        check_no_context(context, context_mask)

        query = self.query(self.token).unflatten(-1, (self.heads, -1))
        key, value = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (self.key(x), self.value(x))
        )
        scores = torch.einsum("h d, b h n d -> b h n", query, key) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        before = None
        if state is not None:
            assert state.maximum is not None
            assert state.total is not None
            assert state.weighted is not None
            before = SoftmaxState(state.maximum, state.total, state.weighted)
        heads, after = softmax_prefix_scan(scores, value, state=before, return_state=True)
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return y if state is None else (y, AarenState(state.length + x.shape[1], *after))


class AarenLayer(nn.Module):
    """A Transformer encoder layer with Aaren in place of self-attention; stack it as it is.

        norm_first=False:  x = norm(x + aaren(x)),  x = norm(x + W_2 relu(W_1 x))
        norm_first=True:   x = x + aaren(norm(x)),  x = x + W_2 relu(W_1 norm(x))

    dim, heads    as in Aaren
    feed_forward  width of the feed-forward part
    dropout       share dropped behind each part and within the feed-forward, in training
    norm_first    norms before the parts and not behind the sums

    The call is that of Aaren: (b, n, dim) to the same, with mask and state.
    Raises ValueError if heads does not divide dim or feed_forward is below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        feed_forward: int = 2048,
        dropout: float = 0.1,
        norm_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("feed_forward", feed_forward)
        self.dropout, self.norm_first = dropout, norm_first
        self.mixer = Aaren(dim, heads=heads, device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.wide = nn.Linear(dim, feed_forward, device=device, dtype=dtype)
        self.narrow = nn.Linear(feed_forward, dim, device=device, dtype=dtype)

    def init_state(self, batch: int) -> AarenState:
        """The state before the first token of `batch` sequences."""
        return self.mixer.init_state(batch)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        state: AarenState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], AarenState]:
        mixed = self.mixer(self.norm1(x) if self.norm_first else x, mask=mask, state=state)
        mixed, after = (mixed, None) if state is None else mixed
        x = x + F.dropout(mixed, self.dropout, self.training)
        if self.norm_first:
            x = x + self._feed_forward(self.norm2(x))
        else:
            x = self.norm1(x)
            x = self.norm2(x + self._feed_forward(x))
        return x if after is None else (x, after)

    def _feed_forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        hidden = F.dropout(F.relu(self.wide(x)), self.dropout, self.training)
        return F.dropout(self.narrow(hidden), self.dropout, self.training)
