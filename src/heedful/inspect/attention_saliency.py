"""Which tokens a prediction was drawn from: attention weights times the gradient of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_choice
from heedful.registry import register


@register("attention-saliency", kind="inspect", paper="lvlms-saliency", tags=("gradient",))
def attention_saliency(
    weights: Float[Tensor, "*b h n m"], gradient: Float[Tensor, "*b h n m"], *, norm: str = "row"
) -> Float[Tensor, "*b n m"]:
    """|A G|, the mean over heads, normalised: who a prediction rests on in a layer.

        S = mean_h |A_h G_h|;   S / ||S||, by row or as a matrix, norms of at least 1e-9

    weights   attention weights; what is hidden has weight 0 and so no saliency
    gradient  of the loss of the token that is judged to these weights
    norm      "row" as in the released code, "matrix" as in the paper

    Raises ValueError if norm is neither. Source: arXiv 2601.20279.
    """
    check_choice("norm", norm, ("row", "matrix"))
    saliency = (weights * gradient).abs().mean(-3)
    size = saliency.norm(dim=-1 if norm == "row" else (-2, -1), keepdim=True)
    return saliency / size.clamp_min(1e-9)


def candidate_saliency(layers: Sequence[Float[Tensor, "n m"]], row: int, begin: int) -> float:
    """S(c): the mean over layers of the mean saliency of keys begin <= j < row for the row that predicts c.

    1 if there is no such key. Source: arXiv 2601.20279.
    """
    if begin >= row:
        return 1.0
    return float(torch.stack([s[row, begin:row].detach().mean() for s in layers]).mean())
