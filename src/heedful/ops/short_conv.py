"""Causal depthwise convolution of a few taps, as linear attention layers have before their heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heedful.ops.segments import in_segments, segment_sizes

# Numbers that a CPU computes at once: what lies between fits its cache and is used again. Of long sequences
# every tensor between would be memory new from the system, which costs more than the sums.
PIECE = 1 << 18
KEEP = 1 << 22  # numbers up to which backward finds all it needs; of more, pieces are computed again


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
    if not x.numel():
        return x, past
    sizes = segment_sizes(n, segment=max(1, PIECE // (b * c)), chunk=1)
    out, past, _ = in_segments(
        _piece, (x.unsqueeze(1),), (past, weight[:, 0]), sizes=sizes, keep=KEEP // (b * c)
    )
    return out.squeeze(1), past


def _piece(x: Tensor, past: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[2]
    tokens = torch.cat([past, x.squeeze(1)], dim=1)
    return _by_taps(tokens, weight, n).unsqueeze(1), tokens[:, n:], weight


def _by_taps(tokens: Tensor, weight: Tensor, n: int) -> Tensor:
    """Tap by tap, summed in float32 or wider."""
    work = torch.promote_types(tokens.dtype, torch.float32)
    wide, taps = tokens.to(work), weight.to(work).mT.contiguous().unbind(0)
    y = wide[:, :n] * taps[0]
    for i, tap in enumerate(taps[1:], start=1):
        y = torch.addcmul(y, wide[:, i : i + n], tap)
    return y.to(tokens.dtype)
