"""Causal depthwise convolution of a few taps, as linear attention layers have before their heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Numbers that a CPU computes at once: what lies between fits its cache and is used again. Of long sequences
# every tensor between would be memory new from the system, which costs more than the sums.
PIECE = 1 << 18


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
    if x.device.type != "cpu":
        tokens = torch.cat([past, x], dim=1)
        return (F.conv1d(tokens.mT, weight, groups=c).mT if n else x), tokens[:, n:]
    outs = []
    for piece in x.split(max(1, PIECE // max(1, b * c)), dim=1):
        tokens = torch.cat([past, piece], dim=1)
        outs.append(_by_taps(tokens, weight[:, 0], piece.shape[1]))
        past = tokens[:, piece.shape[1] :]
    return torch.cat(outs, dim=1), past


def _by_taps(tokens: Tensor, weight: Tensor, n: int) -> Tensor:
    """Tap by tap, summed in float32 or wider."""
    work = torch.promote_types(tokens.dtype, torch.float32)
    wide, taps = tokens.to(work), weight.to(work).mT.contiguous().unbind(0)
    y = wide[:, :n] * taps[0]
    for i, tap in enumerate(taps[1:], start=1):
        y = torch.addcmul(y, wide[:, i : i + n], tap)
    return y.to(tokens.dtype)
