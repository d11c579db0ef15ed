"""Attention as an explanation: what is made of the tables of all layers and heads."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from heedful.registry import register


@register("attention-average", kind="inspect", paper="song-of-disagreement", tags=("attribution",))
def attention_average(weights: Float[Tensor, "*b layers h n m"]) -> Float[Tensor, "*b n"]:
    """max_j mean_lh A_lhij: how much query i looks at one key, on average over layers and heads.

    weights  attention weights of all layers

    Source: arXiv 2205.04559.
    """
    return weights.mean((-4, -3)).amax(-1)


@register("norm-based-attention", kind="inspect", paper="song-of-disagreement", tags=("attribution",))
def norm_based_attention(
    weights: Float[Tensor, "*b h n m"], value: Float[Tensor, "*b h m d"], out: Float[Tensor, "c hd"]
) -> Float[Tensor, "*b h n m"]:
    """||A_hij v_hj W_O,h||: the length of what token j sends to token i through head h.

    weights  attention weights
    value    the values of each head
    out      the weight of the output projection, (channels, heads x head dim) as in nn.Linear

    Raises ValueError if out does not fit the heads. Source: Kobayashi et al., arXiv 2004.10102.
    """
    h, d = value.shape[-3], value.shape[-1]
    if out.shape[1] != h * d:
        raise ValueError(f"out has {out.shape[1]} inputs, must have {h * d}, {d} for each of {h} heads")
    sent = value @ out.unflatten(1, (h, d)).permute(1, 2, 0)
    return weights * sent.norm(dim=-1)[..., None, :]
