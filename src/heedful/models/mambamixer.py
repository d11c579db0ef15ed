"""MambaMixer: token and channel mixers that see weighted sums of all that earlier ones gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.mixers.scan.mambamixer import SelectiveChannelMixer, SelectiveTokenMixer
from heedful.registry import register


class WeightedEarlierFeatures(nn.Module):
    """A learned sum of what came before: sum_i a_i token_i + sum_i b_i channel_i, one number each.

    tokens, channels  how many of each there are
    start             whether the last weight of tokens, and that of channels, is 1 at first; others are 0
    normalized        weights a and b each through a softmax, all equal at first
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        *,
        start: tuple[bool, bool],
        normalized: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized = normalized
        self.tokens = nn.Parameter(torch.zeros(tokens, device=device, dtype=dtype))
        self.channels = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        if not normalized:
            with torch.no_grad():
                self.tokens[-1:] = float(start[0])
                self.channels[-1:] = float(start[1])

    def forward(self, tokens: Sequence[Tensor], channels: Sequence[Tensor]) -> Tensor:
        groups = ((self.tokens, tokens), (self.channels, channels))
        return sum(  # type: ignore[return-value]
            weight * value
            for weights, values in groups
            for weight, value in zip(weights.softmax(0) if self.normalized else weights, values, strict=True)
        )


@register("mambamixer", kind="model", paper="mambamixer", tags=("state space", "channels"))
class MambaMixer(nn.Module):
    """Blocks of a selective token mixer and a selective channel mixer, each fed by all blocks before.

        T_0 = C_0 = x;   for l = 1, 2, ...
        T_l = tokens(sum_(i < l) alpha_li T_i + beta_li C_i)
        C_l = channels(sum_(i <= l) theta_li T_i + sum_(i < l) gamma_li C_i)

    and C of the last block comes out. At first beta_(l, l-1) = theta_(l, l) = gamma_(l, l-1) = 1 and all
    others are 0: an ordinary chain, where the channel mixer gets the token mixer's output plus its input.

    dim, depth   channels, blocks
    length       the largest number of tokens
    normalized   weights of each group through a softmax, all equal at first
    causal       whether the token mixers are; the channel mixers are not
    state_dim, conv_size, expand   of the mixers

    forward: x (b, n, dim) and mask (b, n). Source: MambaMixer, arXiv 2403.19888.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 12, "depth": 2, "length": 9, "state_dim": 4, "expand": 1}

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        length: int,
        normalized: bool = False,
        causal: bool = False,
        state_dim: int = 16,
        conv_size: int = 3,
        expand: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("depth", depth)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        how: dict[str, Any] = {"state_dim": state_dim, "conv_size": conv_size, "expand": expand, **where}
        numbers = range(1, depth + 1)
        self.tokens = nn.ModuleList(SelectiveTokenMixer(dim, causal=causal, **how) for _ in numbers)
        self.channels = nn.ModuleList(SelectiveChannelMixer(dim, length=length, **how) for _ in numbers)
        self.to_tokens, self.to_channels = nn.ModuleList(), nn.ModuleList()
        for number in numbers:
            sums: dict[str, Any] = {"normalized": normalized, **where}
            self.to_tokens.append(WeightedEarlierFeatures(number, number, start=(False, True), **sums))
            self.to_channels.append(WeightedEarlierFeatures(number + 1, number, start=(True, True), **sums))

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        tokens, channels = [x], [x]
        layers = (self.tokens, self.channels, self.to_tokens, self.to_channels)
        for token, channel, to_token, to_channel in zip(*layers, strict=True):
            tokens.append(token(to_token(tokens, channels), mask=mask))
            channels.append(channel(to_channel(tokens, channels), mask=mask))
        return channels[-1]
