"""Expert attention: every token is served by one head, whose output one shared network expands."""

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
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register
from heedful.routing.head_gate import chosen, load_balance, token_lists, wide_linear

ROUTES = ("token", "sequence")


@register(
    "shrp",
    kind="sequence",
    paper="shrp",
    tags=("heads", "softmax", "experts", "router"),
    aliases=("expert-attention",),
    causal="never",
    complexity="O(N^2 C / heads)",
    exempt={"exporting": "the data decide how many tokens a head serves, and with it the sizes of its lists"},
)
class ExpertAttention(Mixer):
    """Each token takes the one head that a router likes best; a shared expander makes the output of it.

        g = softmax(x W_r),  h = argmax g,  o = softmax(q_h K_h^T / sqrt(d)) V_h,  y = g_h W_2 gelu(W_1 o)

    The expander stands in for the output projection and the feed-forward layer. Heads that a token does not
    take cost it nothing but their keys and values.

    dim           channels
    heads         heads, each an expert; with one head there is no router and g = 1
    head_dim      channels a head, d; None: dim / heads
    hidden        channels inside the expander; None: 4 dim
    route         "token": each token has a head; "sequence": all tokens of a row have that of their mean
    load_balance  weight of the auxiliary loss
    dropout       share of the attention weights dropped in training

    In training aux_losses["load_balance"] tells, weighed, how unevenly the heads are used. `usage` counts
    which heads are taken, by which `heedful.convert.shrp_prune` leaves some out. forward: mask (b, n) hides
    tokens as keys; masked ones count in no mean and no loss; `positions` have no effect.
    Raises ValueError if heads do not divide, on wrong shapes, or if a context or a state is given.
    Source: SHRP, arXiv 2512.20635; the paper's abstract leaves the formulas open, these are ours.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 12,
        head_dim: int | None = None,
        hidden: int | None = None,
        route: str = "token",
        load_balance: float = 0.01,
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
        hidden = 4 * dim if hidden is None else hidden
        check_positive("hidden", hidden)
        check_choice("route", route, ROUTES)
        self.heads, self.head_dim, self.hidden, self.route = heads, head_dim, hidden, route
        self.load_balance, self.dropout = load_balance, dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, heads * head_dim, **factory)
        self.key = nn.Linear(dim, heads * head_dim, **factory)
        self.value = nn.Linear(dim, heads * head_dim, **factory)
        self.expand_in = nn.Linear(head_dim, hidden, **factory)
        self.expand_out = nn.Linear(hidden, dim, **factory)
        self.router = nn.Linear(dim, heads, bias=False, **factory) if heads > 1 else None

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: None = None,
    ) -> Float[Tensor, "b n c"]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if state is not None:
            raise ValueError("state is given, must be None: later tokens would change earlier ones")
        # 3. The head of each token.
        probability, taken = self.choose(x, mask=mask)
        loss = self.load_balance * load_balance(probability, taken, mask)
        self.aux_losses = {"load_balance": loss} if self.training and self.router is not None else {}
        # 1. Each head attends for the tokens that took it.
        query, key, value = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads)
            for y in (self.query(x), self.key(x), self.value(x))
        )
        where, real = token_lists(rearrange(taken, "b n h -> b h n"))
        index = where[..., None].expand(-1, -1, -1, self.head_dim)
        dropout = self.dropout if self.training else 0.0
        heads = attention(query.gather(2, index), key, value, key_mask=mask, dropout_p=dropout)
        heads = torch.zeros_like(value).scatter(2, index, heads * real[..., None])
        # 2. The expander, on the one head of each token.
        y = self.expand_out(F.gelu(self.expand_in(heads.sum(1))))
        return y * (probability * taken).sum(-1, keepdim=True).to(y.dtype)

    def choose(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n h"], Bool[Tensor, "b n h"]]:
        """The router's probabilities, and the one head that each token takes."""
        if self.router is None:
            one = x.new_ones(*x.shape[:2], 1)
            return one, one.bool()
        logits = wide_linear(x, self.router.weight)
        if self.route == "sequence":
            # The router is linear: the mean of its outputs is its output for the mean.
            shown = logits.new_ones(x.shape[:2]) if mask is None else mask.to(logits.dtype)
            total = (logits * shown[..., None]).sum(1, keepdim=True)
            logits = (total / shown.sum(1).clamp(min=1)[:, None, None]).expand_as(logits)
        probability = logits.softmax(-1)
        return probability, chosen(probability, 1)

    @torch.no_grad()
    def usage(self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Tensor:
        """How many tokens take each head, (h,)."""
        _, taken = self.choose(x, mask=mask)
        return (taken if mask is None else taken & mask[..., None]).sum((0, 1))
