"""Causal depthwise convolution of a few taps, as linear attention layers have before their heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def short_conv(
    x: Float[Tensor, "b n c"],
    weight: Float[Tensor, "c 1 k"],
    past: Float[Tensor, "b past c"] | None = None,
) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b past c"]]:
    """y_t = sum_i weight_i x_(t - (k - 1) + i), channel by channel: the last tap is for the token itself.

    past: the k - 1 tokens before the first, zeros if None. Gives y, and the past of the tokens that follow.
    Raises ValueError if shapes do not fit.
    """
    b, n, c = x.shape
    taps = weight.shape[-1]
    if weight.shape != (c, 1, taps):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be ({c}, 1, taps)")
    if past is None:
        past = x.new_zeros(b, taps - 1, c)
    elif past.shape != (b, taps - 1, c):
        raise ValueError(f"past has shape {tuple(past.shape)}, must be ({b}, {taps - 1}, {c})")
    tokens = torch.cat([past, x], dim=1)
    y = F.conv1d(tokens.mT, weight, groups=c).mT if n else x
    return y, tokens[:, n:]
