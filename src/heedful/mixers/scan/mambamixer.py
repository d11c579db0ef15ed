"""MambaMixer: selective state spaces over tokens, and over channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import (
    check_mask,
    check_no_context,
    check_positions,
    check_positive,
    check_tokens,
)
from heedful.mixers.mixer import Mixer
from heedful.mixers.scan.selective_ssm import SelectiveSSM
from heedful.mixers.state import State
from heedful.ops.short_conv import short_conv
from heedful.registry import register


@dataclass(frozen=True)
class SelectiveState(State):
    """The state h of every channel, float32 or float64, and the last inputs of the convolution."""

    hidden: Float[Tensor, "b d s"] | None = None
    past: Float[Tensor, "b past d"] | None = None


class SelectiveMix(nn.Module):
    """A gated selective state space over a sequence of vectors, forwards or both ways.

        g = silu(x W_1),  u = silu(conv(x W_2)),   y = ((S6(u) + flip(S6'(flip(u)))) g) W_3

    conv is depthwise with a bias. With causal=True it sees the past alone, and there is no second S6.
    """

    def __init__(
        self,
        width: int,
        *,
        causal: bool,
        state_dim: int,
        conv_size: int,
        expand: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name, value in (("state_dim", state_dim), ("conv_size", conv_size), ("expand", expand)):
            check_positive(name, value)
        inner = expand * width
        self.causal = causal
        self.gate = nn.Linear(width, inner, bias=False, device=device, dtype=dtype)
        self.enter = nn.Linear(width, inner, bias=False, device=device, dtype=dtype)
        self.conv = nn.Conv1d(inner, inner, conv_size, groups=inner, device=device, dtype=dtype)
        self.ssm = SelectiveSSM(
            inner,
            routes=1 if causal else 2,
            state_dim=state_dim,
            rank=math.ceil(width / 16),
            device=device,
            dtype=dtype,
        )
        self.out = nn.Linear(inner, width, bias=False, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "b n c"], state: SelectiveState, *, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], SelectiveState]:
        """Masked tokens are zeros to the convolution and to the state space."""
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        u, past, hidden = self.enter(x), state.past, state.hidden
        taps = self.conv.kernel_size[0]
        if self.causal:
            u, past = short_conv(u, self.conv.weight, past)
        elif x.shape[1]:
            u = F.conv1d(F.pad(u.mT, ((taps - 1) // 2, taps // 2)), self.conv.weight, groups=u.shape[-1]).mT
        u = F.silu(u + cast(Tensor, self.conv.bias))
        if mask is not None:
            u = u.masked_fill(~mask[..., None], 0.0)
        if self.causal:
            y, hidden = self.ssm(u.mT[:, None], state=hidden, return_state=True)
            y = y[:, 0]
        else:
            ahead, back = self.ssm(torch.stack([u.mT, u.mT.flip(2)], dim=1)).unbind(1)
            y = ahead + back.flip(2)
        y = self.out(y.mT.to(x.dtype) * F.silu(self.gate(x)))
        return y, SelectiveState(state.length + x.shape[1], hidden, past)


@register(
    "selective-token-mixer",
    kind="sequence",
    paper="mambamixer",
    tags=("state space", "decay", "gate"),
    aliases=("mambamixer-tokens",),
    causal="optional",
    decode=True,
    complexity="O(N C^2)",
)
class SelectiveTokenMixer(Mixer):
    """Tokens mixed by a gated selective state space in both directions, or forwards alone if causal.

        g = silu(x W_1),  u = silu(conv(x W_2)),   y = ((S6(u) + flip(S6'(flip(u)))) g) W_3

    S6 is the selective state space of Mamba; the two directions have weights of their own.

    dim        channels; u has expand dim
    causal     one direction, and a convolution of the past; needed to decode
    state_dim  numbers of state a channel of u
    conv_size  taps of the convolution
    expand     width of u, in dim

    Padding: a masked token is zeros to the convolution and to the state space, but a step of its decay.
    `positions` have no effect. State: h and the last conv_size - 1 inputs of the convolution.
    Raises ValueError on sizes below 1, on wrong shapes, or if a context is given.
    Source: MambaMixer, arXiv 2403.19888.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "state_dim": 4}

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        state_dim: int = 16,
        conv_size: int = 3,
        expand: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        self.causal = causal
        self.mix = SelectiveMix(
            dim,
            causal=causal,
            state_dim=state_dim,
            conv_size=conv_size,
            expand=expand,
            device=device,
            dtype=dtype,
        )

    def init_state(self, batch: int) -> SelectiveState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                "causal is False, must be True to decode: later tokens would change earlier ones"
            )
        ssm, weight = self.mix.ssm, self.mix.out.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return SelectiveState(
            0,
            weight.new_zeros(batch, ssm.dim, ssm.state_dim, dtype=wide),
            weight.new_zeros(batch, self.mix.conv.kernel_size[0] - 1, ssm.dim),
        )

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
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        check_no_context(context, context_mask)
        if state is not None and not self.causal:
            raise ValueError("state is given, must be None with causal=False")
        y, after = self.mix(x, SelectiveState() if state is None else state, mask=mask)
        return y if state is None else (y, after)


@register(
    "selective-channel-mixer",
    kind="sequence",
    paper="mambamixer",
    tags=("state space", "channels", "gate"),
    aliases=("mambamixer-channels",),
    complexity="O(C L^2), L tokens at most",
)
class SelectiveChannelMixer(Mixer):
    """Channels mixed by a gated selective state space, over the sequence of channels.

        y = mix(x^T)^T,   mix as in `SelectiveTokenMixer`, both ways, over vectors of `length` tokens

    dim        channels
    length     the largest number of tokens; fewer are as if zeros followed
    state_dim, conv_size, expand  as in `SelectiveTokenMixer`, in `length` instead of dim

    Padding: masked tokens are zeros. `positions` have no effect: places are in the weights. Every token sees
    all others, and the order of the channels matters.
    Raises ValueError on sizes below 1, on wrong shapes, more than `length` tokens, or if a context or a state
    is given. Source: MambaMixer, arXiv 2403.19888.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "length": 40, "state_dim": 4, "expand": 1}

    def __init__(
        self,
        dim: int,
        *,
        length: int = 64,
        state_dim: int = 16,
        conv_size: int = 3,
        expand: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("length", length)
        self.length = length
        self.mix = SelectiveMix(
            length,
            causal=False,
            state_dim=state_dim,
            conv_size=conv_size,
            expand=expand,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "b n c"]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        check_no_context(context, context_mask)
        n = x.shape[1]
        if n > self.length:
            raise ValueError(f"x has {n} tokens, must have at most length, which is {self.length}")
        if state is not None:
            raise ValueError("state is given, must be None: every token sees all others")
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        y, _ = self.mix(F.pad(x.mT, (0, self.length - n)), SelectiveState())
        return y[..., :n].mT
