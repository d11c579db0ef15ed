"""Gated DeltaNet: the gated delta rule with short convolutions, a gated norm and learned decay."""

from __future__ import annotations

import math
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
from heedful.ops.delta import gated_delta_rule, l2_normalize
from heedful.ops.short_conv import short_conv
from heedful.registry import register


@dataclass(frozen=True)
class GatedDeltaState(State):
    """The memory S of every head, float32 or float64, and the last inputs of the three convolutions."""

    matrix: Float[Tensor, "b h d e"] | None = None
    query_past: Float[Tensor, "b past inner"] | None = None
    key_past: Float[Tensor, "b past inner"] | None = None
    value_past: Float[Tensor, "b past wide"] | None = None


@register(
    "gated-deltanet",
    kind="sequence",
    paper="infinitevl",
    tags=("linear", "delta rule", "decay", "gate"),
    aliases=("gated-delta-net",),
    causal="always",
    decode=True,
    complexity="O(N C^2)",
)
class GatedDeltaNet(Mixer):
    """The gated delta rule, with everything it needs learned from the token.

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v)),  in heads
        q = q / |q| / sqrt(d),  k = k / |k|,  beta = sigmoid(x W_b),  g = -exp(A) softplus(x W_a + delta)
        S' = exp(g_t) S_(t-1),  S_t = S' + k_t^T beta_t (v_t - k_t S'),  o_t = q_t S_t
        y = concat_h(w o / sqrt(mean(o^2) + eps) silu(x W_g)) W_o

    conv is causal and depthwise. No projection has a bias.

    dim         channels
    heads       heads
    head_dim    channels of a key; None: dim / heads
    expand_v    a value has expand_v head_dim channels, which must be a whole number
    conv_size   taps of the convolutions
    eps         in the norm of the outputs

    A (`log_rate`) and delta (`step_bias`) start from rates in (0, 16) and steps in (0.001, 0.1), as in the
    paper; they should get no weight decay and are marked `_no_weight_decay`. `positions` have no effect.
    Padding: a masked token enters the convolutions as zeros, neither writes nor decays. (InfiniteVL ignores
    the mask in these layers.)
    State: S and the last conv_size - 1 inputs of the convolutions, whatever the length.
    Raises ValueError if the widths do not come out whole, on wrong shapes, or if a context is given.
    Source: Gated Delta Networks, arXiv 2412.06464, as in InfiniteVL, arXiv 2512.08829.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 16,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        conv_size: int = 4,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("heads", heads)
        if head_dim is None:
            check_divides("heads", heads, "dim", dim)
            head_dim = dim // heads
        check_positive("head_dim", head_dim)
        check_positive("conv_size", conv_size)
        value_dim = int(head_dim * expand_v)
        if value_dim < 1 or value_dim != head_dim * expand_v:
            raise ValueError(
                f"expand_v is {expand_v}, must make {head_dim} (head_dim) a whole number above 0"
            )
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim
        inner, wide = heads * head_dim, heads * value_dim

        def linear(width: int) -> nn.Linear:
            return nn.Linear(dim, width, bias=False, device=device, dtype=dtype)

        def taps(width: int) -> nn.Conv1d:
            return nn.Conv1d(width, width, conv_size, groups=width, bias=False, device=device, dtype=dtype)

        self.query, self.key, self.value, self.gate = linear(inner), linear(inner), linear(wide), linear(wide)
        self.step, self.beta = linear(heads), linear(heads)
        self.query_conv, self.key_conv, self.value_conv = taps(inner), taps(inner), taps(wide)
        self.log_rate = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))
        self.step_bias = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))
        self.norm = nn.RMSNorm(value_dim, eps=eps, device=device, dtype=dtype)
        self.out = nn.Linear(wide, dim, bias=False, device=device, dtype=dtype)
        with torch.no_grad():
            self.log_rate.uniform_(torch.finfo(torch.float32).tiny, 16.0).log_()
            step = torch.empty_like(self.step_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
            self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        for parameter in (self.log_rate, self.step_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def init_state(self, batch: int) -> GatedDeltaState:
        """The state before the first token of `batch` sequences."""
        weight = self.out.weight
        past = self.query_conv.kernel_size[0] - 1
        inner, wide = self.heads * self.head_dim, self.heads * self.value_dim
        return GatedDeltaState(
            0,
            weight.new_zeros(
                batch,
                self.heads,
                self.head_dim,
                self.value_dim,
                dtype=torch.promote_types(weight.dtype, torch.float32),
            ),
            weight.new_zeros(batch, past, inner),
            weight.new_zeros(batch, past, inner),
            weight.new_zeros(batch, past, wide),
        )

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: GatedDeltaState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], GatedDeltaState]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        check_no_context(context, context_mask)
        hidden = None if mask is None else ~mask[..., None]
        if hidden is not None:
            x = x.masked_fill(hidden, 0.0)
        before = GatedDeltaState() if state is None else state

        query, query_past = self._taps(self.query(x), self.query_conv, before.query_past)
        key, key_past = self._taps(self.key(x), self.key_conv, before.key_past)
        value, value_past = self._taps(self.value(x), self.value_conv, before.value_past)
        query = l2_normalize(query) * self.head_dim**-0.5
        key = l2_normalize(key)

        wide = torch.promote_types(x.dtype, torch.float32)
        beta = self.beta(x).mT.to(wide).sigmoid()
        # Contiguous, because torch.compile foresees other strides in the gradient of softplus otherwise.
        step = F.softplus((self.step(x) + self.step_bias).mT.contiguous().to(wide))
        log_decay = -self.log_rate.to(wide).exp()[:, None] * step
        if hidden is not None:
            beta, log_decay = beta.masked_fill(hidden.mT, 0.0), log_decay.masked_fill(hidden.mT, 0.0)
        o, matrix = gated_delta_rule(
            query, key, value, beta, log_decay, state=before.matrix, return_state=True
        )

        gate = F.silu(self.gate(x))
        o = F.rms_norm(
            o.transpose(1, 2).to(wide), (self.value_dim,), self.norm.weight.to(wide), self.norm.eps
        )
        y = self.out(o.flatten(2).to(gate.dtype) * gate)
        if state is None:
            return y
        return y, GatedDeltaState(state.length + x.shape[1], matrix, query_past, key_past, value_past)

    def _taps(
        self, x: Float[Tensor, "b n inner"], conv: nn.Conv1d, past: Tensor | None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b past inner"]]:
        y, past = short_conv(x, conv.weight, past)
        return rearrange(F.silu(y), "b n (h d) -> b h n d", h=self.heads), past
