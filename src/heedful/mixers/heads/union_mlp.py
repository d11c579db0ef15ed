"""A feed-forward layer cut into experts, whose sum it is: every token goes to some of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
from heedful.mixers.state import State
from heedful.registry import register
from heedful.routing.head_gate import load_balance
from heedful.routing.sequence_gate import SequenceGate, make_gate

SELECTIONS = ("strict", "paper", "sequence")


@register(
    "union-mlp",
    kind="sequence",
    paper="uoe",
    tags=("experts", "router", "mlp"),
    aliases=("uome", "union-of-mlp-experts"),
    causal="always",
    decode=True,
    complexity="O(N C hidden topk / experts)",
)
class UnionMLP(Mixer):
    """A two-layer perceptron whose hidden channels are cut into experts, some of which take each token.

        y_t = sum over the experts e of t of gelu(x_t W1_e + b1_e) W2_e + b2_e

    With every token at every expert this is the whole perceptron, its last bias the sum of the b2_e.

    dim          channels
    hidden       hidden channels of all experts; None: 4 dim
    experts      a divisor of `hidden`
    topk         experts that a token goes to
    selection    "strict": a token's experts depend on that token alone. "paper": as published, an expert
                 takes half of the tokens of each row (`SwitchGate.published`), so the choice sees the future
                 and the other rows; the attribute `causal` is then False, there is no state, and a mask is
                 refused. "sequence": published too, the experts of a whole sequence are chosen at once
                 (`SequenceGate`), which sees the future; `causal` is False, there is no state
    length       with "sequence", the largest number of tokens
    gate_output  multiply what an expert gives by the token's probability of it, which trains the gate; the
                 authors do not, and the gate then learns from the auxiliary loss alone
    load_balance  weight of the auxiliary loss
    dropout      share of the outputs dropped in training

    In training aux_losses["load_balance"] tells, weighed, how unevenly the experts are used. Nothing mixes
    tokens, so that the state is a count; `positions` have no effect. Raises ValueError if experts do not
    divide hidden, on wrong shapes, and for a context. Source: Union of Experts, arXiv 2503.02495.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "experts": 4}

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        experts: int = 4,
        topk: int = 2,
        selection: str = "strict",
        length: int | None = None,
        gate_output: bool = False,
        load_balance: float = 0.01,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        hidden = 4 * dim if hidden is None else hidden
        check_positive("hidden", hidden)
        check_divides("experts", experts, "hidden", hidden)
        check_choice("selection", selection, SELECTIONS)
        self.experts, self.selection, self.causal = experts, selection, selection == "strict"
        self.gate_output, self.load_balance, self.dropout = gate_output, load_balance, dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = make_gate(dim, experts=experts, topk=topk, selection=selection, length=length, **factory)
        width = hidden // experts
        self.inner = nn.Parameter(torch.empty(experts, dim, width, **factory))
        self.inner_bias = nn.Parameter(torch.zeros(experts, width, **factory))
        self.outer = nn.Parameter(torch.empty(experts, width, dim, **factory))
        self.outer_bias = nn.Parameter(torch.zeros(experts, dim, **factory))
        for matrix in (*self.inner.detach(), *self.outer.detach()):
            nn.init.xavier_normal_(matrix)

    def init_state(self, batch: int) -> State:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                f"selection is {self.selection!r}, must be 'strict' to decode: it reads later tokens"
            )
        return State()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], State]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if mask is not None and self.selection == "paper":
            raise ValueError("mask is given, must be None with selection='paper'")
        if state is not None and not self.causal:
            raise ValueError(f"state is given, must be None with selection={self.selection!r}")
        # 1. Each token's experts, or those of the whole sequence.
        if isinstance(self.gate, SequenceGate):
            s, taken = self.gate(x, mask=mask)
            loss = load_balance(s, taken, None if mask is None else mask.any(1, keepdim=True))
            s, taken = (t.expand(-1, x.shape[1], -1) for t in (s, taken))
        else:
            s, taken = self.gate(x)
            loss = load_balance(s, taken, mask)
            if self.selection == "paper":
                _, taken = self.gate.published(x, length=x.shape[1] // 2)
        self.aux_losses = {"load_balance": self.load_balance * loss} if self.training else {}
        # 2. Each expert on its tokens; the results are added where they came from.
        flat, sums = x.flatten(0, 1), []
        for e in range(self.experts):
            rows = taken[..., e].flatten().nonzero()[:, 0]
            inner = F.gelu(F.linear(flat[rows], self.inner[e].T, self.inner_bias[e]))
            y = F.linear(inner, self.outer[e].T, self.outer_bias[e])
            if self.gate_output:
                y = y * s[..., e].flatten()[rows, None].to(y.dtype)
            sums.append(y.new_zeros(flat.shape).index_copy(0, rows, y))
        y = torch.dropout(torch.stack(sums).sum(0).view_as(x), self.dropout, self.training)
        return y if state is None else (y, State(state.length + x.shape[1]))
