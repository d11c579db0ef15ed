"""How much of a speech model's saliency its cross-attention tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_choice
from heedful.inspect.rank_correlation import pearson
from heedful.registry import register


@dataclass(frozen=True, eq=False)
class CrossAgreement:
    """Pearson's correlation with saliency: of each head, each layer's mean and the mean of all."""

    heads: Float[Tensor, "layers h"]
    layers: Float[Tensor, " layers"]
    overall: float


def saliency_by_frame(
    saliency: Float[Tensor, "i t f"], frames: int, *, reduce: str = "mean"
) -> Float[Tensor, "i frames"]:
    """The mean or the largest over channels, then the mean over the span of each encoder frame.

    frames  of the encoder; frame s spans the input from s t / frames to (s + 1) t / frames
    """
    check_choice("reduce", reduce, ("mean", "max"))
    over_time = saliency.mean(-1) if reduce == "mean" else saliency.amax(-1)
    return F.adaptive_avg_pool1d(over_time, frames)


@register(
    "cross-attention-agreement",
    kind="inspect",
    paper="cross-attention-half-explanation",
    tags=("agreement",),
    cross=True,
)
def cross_attention_agreement(
    attention: Float[Tensor, "layers h i m"],
    saliency: Float[Tensor, "i t *f"],
    *,
    reduce: str = "mean",
    valid: int | None = None,
) -> CrossAgreement:
    """Pearson's correlation of cross-attention and saliency over all output tokens and encoder frames.

    attention  of forced decoding; `heedful.inspect.cross_attention`
    saliency   of the input, (tokens, frames, channels), brought down to encoder frames; or of the encoder's
               output, (tokens, frames)
    reduce     "mean" or "max" over channels
    valid      encoder frames that are no padding; by default all

    Take the mean over samples. Raises ValueError where sizes do not fit. Source: arXiv 2509.18010.
    """
    *_, i, m = attention.shape
    if saliency.ndim == 2:
        saliency = saliency[..., None]
    if saliency.ndim != 3 or len(saliency) != i or saliency.shape[1] < m:
        raise ValueError(
            f"saliency has shape {tuple(saliency.shape)}, must be ({i}, frames, channels) with "
            f"{m} frames or more"
        )
    own = saliency_by_frame(saliency, m, reduce=reduce)[:, :valid].flatten()

    def agreement(table: Tensor) -> float:
        return pearson(table[:, :valid].flatten(), own)

    return CrossAgreement(
        torch.tensor([[agreement(head) for head in layer] for layer in attention]),
        torch.tensor([agreement(layer.mean(0)) for layer in attention]),
        agreement(attention.mean((0, 1))),
    )
