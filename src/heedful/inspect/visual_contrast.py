"""How attention to an image for a question differs from that for a general instruction."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.registry import register


@register("contrast-attention", kind="inspect", paper="carve", tags=("image",))
def contrast_attention(
    question: Float[Tensor, "*b n"], general: Float[Tensor, "*b n"], ridge: float = 1e-8
) -> Float[Tensor, "*b n"]:
    """Attention to image tokens for a question, over that for a general instruction.

        c = a_question / (a_general + ridge)

    What the image attracts by itself cancels. Computed in float32 at least. Source: CARVE, arXiv 2509.06461.
    """
    wide = torch.promote_types(question.dtype, torch.float32)
    return question.to(wide) / (general.to(wide) + ridge)


@register("visual-attention-entropy", kind="inspect", paper="carve", tags=("image",))
def visual_attention_entropy(attention: Float[Tensor, "*b l n"]) -> Float[Tensor, "*b"]:
    """How diffuse attention to image tokens is: the mean over layers of -sum a ln a, as it is.

    Source: CARVE, arXiv 2509.06461.
    """
    return torch.special.entr(attention).sum(-1).mean(-1)


@register("color-complexity", kind="inspect", paper="carve", tags=("image",))
def color_complexity(pixels: Float[Tensor, "3 height width"]) -> float:
    """The entropy of the hues of an image, in 180 bins of two degrees, over ln 180; greys have hue 0.

    pixels  red, green, blue of any scale

    Source: CARVE, arXiv 2509.06461.
    """
    red, green, blue = pixels.double()
    high, low = pixels.double().amax(0), pixels.double().amin(0)
    spread = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    hue = torch.where(
        high == red,
        (green - blue) / spread,
        torch.where(high == green, 2 + (blue - red) / spread, 4 + (red - green) / spread),
    )
    bins = (30 * hue).remainder(180).masked_fill(high == low, 0.0).long().clamp_max(179)
    share = torch.bincount(bins.flatten(), minlength=180) / bins.numel()
    return float(torch.special.entr(share.double()).sum()) / math.log(180)
