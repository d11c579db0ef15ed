"""How alike the rows of attention maps are, as a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heedful.registry import register


@register("attention-diversification-loss", kind="op", paper="tap-adl", tags=("loss", "softmax"))
def attention_diversification_loss(
    maps: Sequence[Float[Tensor, "_b _h _n _m"]], *, threshold: float = 2.0
) -> Float[Tensor, ""]:
    """The mean cosine similarity of what a query attends to and what all queries attend to on average.

        a = mean_heads(A),   s = mean_i a_i,   both zero where they are at most threshold / m
        L = sum_layers mean_bi cos(s, a_i) / (layers + 1e-6)

    maps       attention weights A of each layer, behind their dropout
    threshold  in units of a uniform weight

    The loss is 1 where all queries attend to one and the same token, 0 where none attends much to anything.
    Raises ValueError if there is no map. Source: Robustifying Token Attention for Vision Transformers,
    arXiv 2303.11126.
    """
    if not maps:
        raise ValueError("maps is empty, must hold the attention weights of at least one layer")
    total = torch.stack([_similarity(weights.mean(1), threshold) for weights in maps]).sum()
    return total / (len(maps) + 1e-6)


def _similarity(a: Float[Tensor, "b n m"], threshold: float) -> Float[Tensor, ""]:
    low = threshold / a.shape[-1]
    mean = a.mean(1, keepdim=True)
    mean, a = (torch.where(weights > low, weights, 0) for weights in (mean, a))
    return F.cosine_similarity(mean, a, dim=-1).mean()
