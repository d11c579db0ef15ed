"""Mamba: a selective state space behind a short convolution, with a gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import check_mask, check_no_context, check_positions, check_positive, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.ops.scan import selective_scan
from heedful.ops.short_conv import short_conv
from heedful.registry import register


@dataclass(frozen=True)
class MambaState(State):
    """The state h of every channel, float32 or float64, and the last inputs of the convolution."""

    hidden: Float[Tensor, "b d s"] | None = None
    past: Float[Tensor, "b past d"] | None = None


@register(
    "mamba",
    kind="sequence",
    paper="mamba",
    tags=("state space", "decay", "gate"),
    aliases=("s6", "mamba-1"),
    causal="always",
    decode=True,
    complexity="O(N C^2)",
)
class Mamba(Mixer):
    """A state space whose step, input and output maps come from the token; the mixer of Mamba (S6).

        u, z = x W_in,  u = silu(conv(u))
        r, B, C = u W_read,  delta = softplus(r W_step + b),  A = -exp(log_rate)
        h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t,  o_t = C_t . h_t + D u_t
        y = (o silu(z)) W_out

    conv is causal and depthwise, with a bias; r has ceil(dim / 16) channels; W_in, W_read and W_out have no
    bias.

    dim        channels; u has expand dim of them
    state_dim  numbers of state a channel of u
    conv_size  taps of the convolution
    expand     width of u, in dim

    A starts at -1 .. -state_dim, D (`skip`) at 1, and b such that steps lie in (0.001, 0.1). `log_rate` and
    `skip` should get no weight decay and are marked `_no_weight_decay`. `positions` have no effect.
    Padding: a masked token enters the convolution as zeros and has a step of 0, so that it neither writes nor
    decays. State: h and the last conv_size - 1 inputs of the convolution, whatever the length.
    Raises ValueError on wrong shapes or if a context is given.
    Source: Mamba, arXiv 2312.00752.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "state_dim": 4}

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 16,
        conv_size: int = 4,
        expand: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("state_dim", state_dim)
        check_positive("conv_size", conv_size)
        check_positive("expand", expand)
        self.inner, self.state_dim, self.rank = expand * dim, state_dim, math.ceil(dim / 16)

        def linear(width: int, out: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(width, out, bias=bias, device=device, dtype=dtype)

        self.enter = linear(dim, 2 * self.inner)
        self.conv = nn.Conv1d(
            self.inner, self.inner, conv_size, groups=self.inner, device=device, dtype=dtype
        )
        self.read = linear(self.inner, self.rank + 2 * state_dim)
        self.step = linear(self.rank, self.inner, bias=True)
        rates = torch.arange(1, state_dim + 1, device=device, dtype=dtype or torch.get_default_dtype())
        self.log_rate = nn.Parameter(rates.log().repeat(self.inner, 1))
        self.skip = nn.Parameter(torch.ones(self.inner, device=device, dtype=dtype))
        self.out = linear(self.inner, dim)
        with torch.no_grad():
            self.step.weight.uniform_(-(self.rank**-0.5), self.rank**-0.5)
            step = torch.empty_like(self.step.bias).uniform_(math.log(0.001), math.log(0.1)).exp()
            self.step.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        for parameter in (self.log_rate, self.skip):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def init_state(self, batch: int) -> MambaState:
        """The state before the first token of `batch` sequences."""
        weight = self.out.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return MambaState(
            0,
            weight.new_zeros(batch, self.inner, self.state_dim, dtype=wide),
            weight.new_zeros(batch, self.conv.kernel_size[0] - 1, self.inner),
        )

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: MambaState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], MambaState]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        check_no_context(context, context_mask)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        before = MambaState() if state is None else state

        u, z = self.enter(x).chunk(2, dim=-1)
        u, past = short_conv(u, self.conv.weight, before.past)
        u = F.silu(u + cast(Tensor, self.conv.bias))
        r, B, C = self.read(u).split([self.rank, self.state_dim, self.state_dim], dim=-1)

        wide = torch.promote_types(x.dtype, torch.float32)
        step = F.softplus(F.linear(r, self.step.weight).to(wide) + self.step.bias.to(wide))
        if mask is not None:
            step = step.masked_fill(~mask[..., None], 0.0)
        A = -self.log_rate.to(wide).exp()
        o, hidden = selective_scan(
            u.mT, step.mT, A, B.mT, C.mT, self.skip, z=z.mT, state=before.hidden, return_state=True
        )
        y = self.out(o.mT)
        if state is None:
            return y
        return y, MambaState(state.length + x.shape[1], hidden, past)
