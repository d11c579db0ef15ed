"""Attention as conditioning: keys are cues, values responses, and a matrix learns what follows what."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import (
    check_choice,
    check_divides,
    check_mask,
    check_no_context,
    check_positions,
    check_tokens,
)
from heedful.mixers.linear.lightning_attention_2 import LinearState
from heedful.mixers.mixer import Mixer
from heedful.ops.delta import gated_delta_rule, l2_normalize
from heedful.ops.linear import linear_attention
from heedful.registry import register

RULES = ("hebb", "delta", "oja")


@register(
    "hebbian-attention",
    kind="sequence",
    paper="pavlovian",
    tags=("linear", "memory", "decay"),
    aliases=("pavlovian",),
    causal="optional",
    decode=True,
    complexity="O(N C^2 / heads)",
)
class HebbianAttention(Mixer):
    """Linear attention as an associative memory, written by one of three learning rules.

        q, k, v = x W;   S_t = keep S_(t-1) + rate D(k_t, v_t, S_(t-1)),   o_t = S_t q_t,   y = W_o concat_h o
        hebb   D = v k^T                 what occurs together is joined
        delta  D = (v - S k) k^T         what was expected is not learned again (Rescorla-Wagner)
        oja    D = v k^T - (k . k) S     what is new makes room for itself

    Causal, a token reads what was written up to it; else all tokens read what all have written, in order.

    dim        channels
    heads      divides dim
    rule       "hebb", "delta" or "oja"
    keep       what stays of the memory from token to token, over 0 and at most 1
    rate       how far a token writes, over 0; with `unit_keys` at most 1, where delta recalls the last pair
               exactly and oja (with keep 1) holds it alone
    unit_keys  whether keys (and queries) have length 1; without, the rules delta and oja may grow for ever

    Padding: masked tokens neither write nor decay. `positions` have no effect. State: S, of dim^2 / heads
    numbers whatever the length.
    Raises ValueError if heads does not divide dim, on an unknown rule and numbers out of their range, on
    wrong shapes, or if a context is given.
    The rules and the reading are the paper's, projections, lengths and defaults heedful's.
    Source: Understanding Transformers through the Lens of Pavlovian Conditioning, arXiv 2508.08289.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "rule": "delta", "keep": 0.9}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        rule: str = "hebb",
        keep: float = 1.0,
        rate: float = 0.5,
        unit_keys: bool = True,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_choice("rule", rule, RULES)
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep is {keep}, must be over 0 and at most 1")
        if rate <= 0.0 or (unit_keys and rate > 1.0):
            raise ValueError(f"rate is {rate}, must be over 0, and at most 1 with unit_keys")
        self.heads, self.rule, self.keep, self.rate = heads, rule, keep, rate
        self.unit_keys, self.causal = unit_keys, causal
        self.query, self.key, self.value, self.out = (
            nn.Linear(dim, dim, bias=False, device=device, dtype=dtype) for _ in range(4)
        )

    def init_state(self, batch: int) -> LinearState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                "causal is False, must be True to decode: later tokens would change earlier ones"
            )
        weight, width = self.out.weight, self.dim // self.heads
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return LinearState(0, weight.new_zeros(batch, self.heads, width, width, dtype=dtype))

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: LinearState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], LinearState]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        check_no_context(context, context_mask)
        if state is not None and not self.causal:
            raise ValueError("state is given, must be None with causal=False")
        q, k, v = (
            rearrange(project(x), "b n (h d) -> b h n d", h=self.heads)
            for project in (self.query, self.key, self.value)
        )
        if self.unit_keys:
            q, k = l2_normalize(q), l2_normalize(k)
        o, matrix = self.associate(q, k, v, mask=mask, state=None if state is None else state.matrix)
        y = self.out(rearrange(o, "b h n d -> b n (h d)"))
        return y if state is None else (y, LinearState(state.length + x.shape[1], matrix))

    def associate(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n e"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        state: Float[Tensor, "b h d e"] | None = None,
    ) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
        """Write the pairs by the rule and read the queries; gives what was read, and S^T after the last."""
        wide = torch.promote_types(key.dtype, torch.float32)
        log_decay = torch.full(key.shape[:3], math.log(self.keep), dtype=wide, device=key.device)
        written = torch.full_like(log_decay, self.rate)
        if self.rule == "oja":
            # Below 0 the old would come back with its sign turned; nothing is left of it instead.
            kept = self.keep - self.rate * key.to(wide).square().sum(-1)
            log_decay = kept.clamp(min=torch.finfo(wide).tiny).log()
        if mask is not None:
            log_decay, written = (t.masked_fill(~mask[:, None], 0.0) for t in (log_decay, written))
        if self.rule == "delta":
            # The operator forgets before it compares, so that the value is what would be left of it.
            beta = written / self.keep
            o, matrix = gated_delta_rule(
                query, key, value * self.keep, beta, log_decay, state=state, return_state=True
            )
            return (o, matrix) if self.causal else (query @ matrix.to(query.dtype), matrix)
        value = value * written[..., None].to(value.dtype)
        if self.causal:
            return linear_attention(query, key, value, log_decay, state=state, return_state=True)  # type: ignore[return-value]
        since = log_decay.sum(-1, keepdim=True) - log_decay.cumsum(-1)  # what is lost after each token
        key = key * since.exp()[..., None].to(key.dtype)
        return linear_attention(query, key, value, causal=False, return_state=True)  # type: ignore[return-value]
