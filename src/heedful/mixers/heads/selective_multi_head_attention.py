"""Selective multi-head attention: tokens or sequences choose their heads, heads attend among their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from heedful.checks import (
    check_choice,
    check_divides,
    check_mask,
    check_no_context,
    check_positions,
    check_tokens,
)
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.ops.attention import attention
from heedful.ops.rotary import rotary_angles, rotate
from heedful.patterns.causal import Causal
from heedful.registry import register
from heedful.routing.head_gate import load_balance, token_lists
from heedful.routing.sequence_gate import SequenceGate, make_gate

SELECTIONS = ("strict", "paper", "sequence")


@dataclass(frozen=True)
class SelectiveState(State):
    """Keys and values of the k heads that each token chose, and which heads those are; mask as in KVState."""

    key: Float[Tensor, "b m k d"] | None = None
    value: Float[Tensor, "b m k d"] | None = None
    head: Int[Tensor, "b m k"] | None = None
    mask: Bool[Tensor, "b m"] | None = None


@register(
    "selective-multi-head-attention",
    kind="sequence",
    paper="uoe",
    tags=("heads", "softmax", "experts", "router"),
    aliases=("smha", "uoe"),
    causal="always",
    decode=True,
    complexity="O(N^2 C topk^2 / heads^2)",
    exempt={"exporting": "the data decide how many tokens a head takes, and with it the sizes of its lists"},
)
class SelectiveMultiHeadAttention(Mixer):
    """Heads as experts: a token goes to its best heads, a head attends causally among the tokens it got.

        T_e = tokens that chose head e (`SwitchGate`), in their order; q, k turned by their places in T_e
        y_t = sum over the heads e of t of (softmax(q_e k_e^T / sqrt(d)) v_e)_t W_o,e + b_o,e

    Each head has an output bias of its own, which only its tokens get.

    dim          channels
    heads        heads, a divisor of dim
    topk         heads that a token goes to; None: half of them
    selection    "strict": a token's heads depend on that token alone. "paper": as published, a head takes
                 as many tokens of each row as the fullest head of the batch (`SwitchGate.published`), so the
                 choice sees the future and the other rows; the attribute `causal` is then False, there is no
                 state, and a mask is refused. "sequence": published too, the heads of a whole sequence are
                 chosen at once (`SequenceGate`), which sees the future however the heads then hide it;
                 `causal` is False, there is no state
    length       with "sequence", the largest number of tokens
    gate_output  multiply what a head gives by the token's probability of it, which trains the gate; the
                 authors do not, and the gate then learns from the auxiliary loss alone
    load_balance  weight of the auxiliary loss
    rotary_base  of the rotary embedding (channel j with j + d / 2)
    dropout      share of the attention weights dropped in training

    In training aux_losses["load_balance"] tells, weighed, how unevenly the heads are used. State: 2 topk d
    numbers a token and the names of its heads (2 bytes each). `positions` have no effect, places in T_e have.
    Raises ValueError if heads do not divide, on wrong shapes, and for a context.
    Source: Union of Experts, arXiv 2503.02495.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 10,
        topk: int | None = None,
        selection: str = "strict",
        length: int | None = None,
        gate_output: bool = False,
        load_balance: float = 0.01,
        rotary_base: float = 10000.0,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_choice("selection", selection, SELECTIONS)
        self.heads, self.head_dim = heads, dim // heads
        if self.head_dim % 2:
            raise ValueError(f"heads is {heads}, must leave an even number of channels a head, of {dim}")
        self.selection, self.causal = selection, selection == "strict"
        self.gate_output, self.load_balance = gate_output, load_balance
        self.rotary_base, self.dropout = rotary_base, dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        topk = max(1, heads // 2) if topk is None else topk
        self.gate = make_gate(dim, experts=heads, topk=topk, selection=selection, length=length, **factory)
        self.query = nn.Linear(dim, dim, **factory)
        self.kv = nn.Linear(dim, 2 * dim, **factory)  # head after head, first its keys, then its values
        self.out = nn.Parameter(torch.empty(heads, self.head_dim, dim, **factory))
        self.out_bias = nn.Parameter(torch.zeros(heads, dim, **factory))
        for linear in (self.query, self.kv):
            nn.init.zeros_(linear.bias)
            for rows in linear.weight.detach().chunk(heads):
                nn.init.xavier_normal_(rows)
        for matrix in self.out.detach():
            nn.init.xavier_normal_(matrix)

    def init_state(self, batch: int) -> SelectiveState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                f"selection is {self.selection!r}, must be 'strict' to decode: it reads later tokens"
            )
        return SelectiveState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: SelectiveState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], SelectiveState]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if mask is not None and self.selection == "paper":
            raise ValueError("mask is given, must be None with selection='paper'")
        if state is not None and not self.causal:
            raise ValueError(f"state is given, must be None with selection={self.selection!r}")
        if isinstance(self.gate, SequenceGate):
            return self._by_sequence(x, mask)
        if self.selection == "paper":
            return self.published(x)
        # 1. Each token's heads.
        s, taken = self.gate(x)
        self._note(s, taken, mask)
        shown = taken if mask is None else taken & mask[..., None]
        mine = rearrange(shown, "b n h -> b h n")
        # 2. Places in the lists of the heads, after those that a state holds.
        place, listed = _places(mine), mine
        old = None if state is None else self._held(state)
        if old is not None:
            place, listed = place + old[2].sum(-1, keepdim=True), torch.cat([old[2], mine], dim=2)
        query, new_key, new_value = self._project(x, x, place, place)
        # 3. to 5. Attention within the lists.
        key, value = new_key, new_value
        if old is not None:
            key, value = torch.cat([old[0], key], dim=2), torch.cat([old[1], value], dim=2)
        y = self._attend(query, key, value, mine, listed, s)
        if state is None:
            return y
        return y, self._kept(state, new_key, new_value, taken, mask)

    def published(
        self, x: Float[Tensor, "b n c"], *, memory: Float[Tensor, "b m c"] | None = None
    ) -> Float[Tensor, "b n c"]:
        """The authors' selection; `memory` stands before x, goes through the same gate, and is seen by all.

        Queries are turned by their places among the chosen tokens of x, keys by those among the chosen
        tokens of the memory and of x, as published.
        """
        if isinstance(self.gate, SequenceGate):
            raise ValueError("selection is 'sequence', must be 'strict' or 'paper': its gate knows no tokens")
        s, taken = self.gate(x)
        self._note(s, taken, None)
        _, selected = self.gate.published(x)
        mine = listed = rearrange(selected, "b n h -> b h n")
        source = x
        if memory is not None:
            check_tokens("memory", memory, self.dim)
            _, of_memory = self.gate.published(memory)
            listed = torch.cat([rearrange(of_memory, "b m h -> b h m"), mine], dim=2)
            source = torch.cat([memory, x], dim=1)
        query, key, value = self._project(x, source, _places(mine), _places(listed))
        return self._attend(query, key, value, mine, listed, s)

    def _by_sequence(self, x: Tensor, mask: Tensor | None) -> Float[Tensor, "b n c"]:
        """Each head on the sequences that chose it, as causal attention among all of their tokens."""
        # 1. Each sequence's heads.
        s, taken = self.gate(x, mask=mask)
        self._note(s, taken, None if mask is None else mask.any(1, keepdim=True))
        place = torch.arange(x.shape[1], device=x.device) if mask is None else mask.long().cumsum(1) - 1
        turn = {"base": self.rotary_base, "dtype": x.dtype}
        angles = rotary_angles(place, self.head_dim, **turn).expand(x.shape[0], -1, -1)  # type: ignore[arg-type]
        parameters = zip(
            *(
                t.chunk(self.heads)
                for t in (self.query.weight, self.query.bias, self.kv.weight, self.kv.bias)
            ),
            self.out,
            self.out_bias,
            strict=True,
        )
        y = torch.zeros_like(x)
        for e, (q_weight, q_bias, kv_weight, kv_bias, out, out_bias) in enumerate(parameters):
            rows = taken[:, 0, e].nonzero()[:, 0]
            # 2. Queries and keys, turned by their places, and values.
            query = rotate(F.linear(x[rows], q_weight, q_bias), angles[rows])
            key, value = F.linear(x[rows], kv_weight, kv_bias).chunk(2, dim=-1)
            key = rotate(key, angles[rows])
            # 3. to 5. Attention, and its part of the sum.
            head = attention(
                *(t[:, None] for t in (query, key, value)),
                pattern=Causal(),
                key_mask=None if mask is None else mask[rows],
                dropout_p=self.dropout if self.training else 0.0,
            )
            part = F.linear(head[:, 0], out.T, out_bias)
            if self.gate_output:
                part = part * s[rows, :, e, None].to(part.dtype)
            y = y.index_add(0, rows, part.to(y.dtype))
        return y

    def _note(self, s: Tensor, taken: Tensor, mask: Tensor | None) -> None:
        loss = self.load_balance * load_balance(s, taken, mask)
        self.aux_losses = {"load_balance": loss} if self.training else {}

    def _project(
        self, x: Tensor, source: Tensor, query_place: Tensor, key_place: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        query = rearrange(self.query(x), "b n (h d) -> b h n d", h=self.heads)
        key, value = rearrange(self.kv(source), "b m (h two d) -> two b h m d", h=self.heads, two=2)
        turn = {"base": self.rotary_base, "dtype": x.dtype}
        query = rotate(query, rotary_angles(query_place, self.head_dim, **turn))  # type: ignore[arg-type]
        key = rotate(key, rotary_angles(key_place, self.head_dim, **turn))  # type: ignore[arg-type]
        return query, key, value

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mine: Tensor, listed: Tensor, s: Tensor
    ) -> Float[Tensor, "b n c"]:
        """mine (b, h, n), listed (b, h, m): which tokens of x, and of the keys, are on a head's list."""
        where, real = token_lists(mine)
        key_where, key_real = token_lists(listed)

        def rows(x: Tensor, index: Tensor) -> Tensor:
            picked = x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
            return picked.flatten(0, 1)[:, None]

        # Lists end together, so that causality by places from the end is causality of tokens.
        heads = attention(
            rows(query, where),
            rows(key, key_where),
            rows(value, key_where),
            pattern=Causal(),
            key_mask=key_real.flatten(0, 1),
            dropout_p=self.dropout if self.training else 0.0,
        )
        heads = heads[:, 0].unflatten(0, mine.shape[:2]) * real[..., None]
        back = torch.zeros_like(query, dtype=heads.dtype)
        back = back.scatter(2, where[..., None].expand_as(heads), heads)
        share = rearrange(mine, "b h n -> b n h").to(back.dtype)
        if self.gate_output:
            share = share * s.to(back.dtype)
        back = back * rearrange(share, "b n h -> b h n 1")
        y = F.linear(rearrange(back, "b h n d -> b n (h d)"), rearrange(self.out, "h d c -> c (h d)"))
        return y + F.linear(share, self.out_bias.T)

    def _held(self, state: SelectiveState) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and lists of a state, for all heads; None while it is empty."""
        if state.key is None or state.value is None or state.head is None:
            return None
        index = state.head.long()
        listed = index.new_zeros(*index.shape[:2], self.heads, dtype=torch.bool).scatter(2, index, True)
        if state.mask is not None:
            listed = listed & state.mask[..., None]
        wide = index[..., None].expand_as(state.key)
        key, value = (
            rearrange(t.new_zeros(*listed.shape, self.head_dim).scatter(2, wide, t), "b m h d -> b h m d")
            for t in (state.key, state.value)
        )
        return key, value, rearrange(listed, "b m h -> b h m")

    def _kept(
        self, state: SelectiveState, key: Tensor, value: Tensor, taken: Tensor, mask: Tensor | None
    ) -> SelectiveState:
        """The state after the tokens of a call."""
        head = taken.to(torch.uint8).topk(self.gate.topk, dim=-1).indices
        wide = head[..., None].expand(-1, -1, -1, self.head_dim)
        key, value = (rearrange(t, "b h n d -> b n h d").gather(2, wide) for t in (key, value))
        head = head.to(torch.int16)
        if mask is not None or state.mask is not None:
            new = torch.ones_like(taken[..., 0]) if mask is None else mask
            old = new.new_ones(len(new), state.length) if state.mask is None else state.mask
            mask = torch.cat([old, new], dim=1)
        length = state.length + taken.shape[1]
        if state.key is not None and state.value is not None and state.head is not None:
            key, value = torch.cat([state.key, key], dim=1), torch.cat([state.value, value], dim=1)
            head = torch.cat([state.head, head], dim=1)
        return SelectiveState(length, key, value, head, mask)


def _places(listed: Bool[Tensor, "b h n"]) -> Int[Tensor, "b h n"]:
    """The place of each token on the list, where it is on it."""
    return listed.long().cumsum(-1) - 1
