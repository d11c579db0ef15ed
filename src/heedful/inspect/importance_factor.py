"""What Gaussian adaptive attention finds important: its weights, brought to one scale and averaged."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heedful.registry import register


@register("importance-factor", kind="inspect", paper="gaam", tags=("attribution",))
def importance_factor(
    weights: Float[Tensor, "b *features"],
    *,
    axis: int | None = None,
    shown: Bool[Tensor, "b *features"] | None = None,
) -> Float[Tensor, "..."]:
    """How much weight each feature or layer gets, from 0 to 1, on average over samples.

        IF = mean over samples of (w - min w) / (max w - min w), min and max over the weights of the sample

    weights  attention weights of one layer for b samples, as `GaussianAdaptiveAttention.weights` gives them
    axis     the axis of `weights` to rank, by the mean over all others; None: all but the first
    shown    the weights that count; those of padding should not. None: all

    A sample of equal weights has factors 0; so has what is shown in no sample. Ours: `axis`, `shown`,
    and that each sample has its own min and max. Raises ValueError if there is no sample or no such axis.
    Source: Gaussian Adaptive Attention is All You Need, arXiv 2401.11143.
    """
    if weights.ndim < 2 or not weights.numel():
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, must be (samples, features), neither empty"
        )
    if axis is not None and not 1 <= axis < weights.ndim:
        raise ValueError(f"axis is {axis}, must be one of 1 to {weights.ndim - 1}")
    if shown is None:
        shown = torch.ones_like(weights, dtype=torch.bool)
    if shown.shape != weights.shape:
        raise ValueError(f"shown has shape {tuple(shown.shape)}, must be {tuple(weights.shape)}, as weights")
    features = tuple(range(1, weights.ndim))
    low = weights.masked_fill(~shown, torch.inf).amin(features, keepdim=True)
    high = weights.masked_fill(~shown, -torch.inf).amax(features, keepdim=True)
    spread = high - low
    scaled = torch.where(shown & (spread > 0), (weights - low) / spread, 0.0)
    others = 0 if axis is None else tuple(i for i in range(weights.ndim) if i != axis)
    return scaled.sum(others) / shown.sum(others).clamp(min=1)
