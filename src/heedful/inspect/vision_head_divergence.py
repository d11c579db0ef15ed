"""How much each attention head's output depends on the image."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from heedful.checks import check_positive
from heedful.registry import register


def _high(x: Float[Tensor, "*b h"]) -> Bool[Tensor, "*b h"]:
    """More than a standard deviation (the unbiased one) above the mean of the heads."""
    return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True)


@register("vision-head-divergence", kind="inspect", paper="vhr", tags=("image", "heads"))
def vision_head_divergence(
    seen: Float[Tensor, "*b h d"], unseen: Float[Tensor, "*b h d"], *, outliers: bool = False
) -> Float[Tensor, "*b h"]:
    """How far the output of each head of a layer moves when the image is taken out of the context.

        VHD_i = || A_i(with image) - A_i(without) ||_2,   0 for a head that surges without the image:
                if VHD_i > mean + std of the layer's VHD  and  ||A_i(without)||^2 > mean + std of those

    seen, unseen  outputs of the heads at the last position, before the output projection, for the prompt and
                  for the same prompt without image tokens
    outliers      whether to keep the heads that surge

    Computed in float32 at least. Source: VHR, arXiv 2412.13949.
    """
    if seen.element_size() < 4:
        seen, unseen = seen.float(), unseen.float()
    divergence = (seen - unseen).norm(dim=-1)
    if outliers or divergence.shape[-1] < 2:
        return divergence
    return divergence.masked_fill(_high(divergence) & _high(unseen.square().sum(-1)), 0.0)


@register("token-vhd", kind="inspect", paper="vhr", tags=("image", "heads"))
def token_vhd(divergence: Float[Tensor, "layers *b h"], k: int) -> Float[Tensor, "*b"]:
    """How much a generated token owes to the image: the k largest divergences of each layer, added up.

    It is lower for hallucinated words. Raises ValueError unless 1 <= k <= h. Source: VHR, arXiv 2412.13949.
    """
    check_positive("k", k)
    if k > divergence.shape[-1]:
        raise ValueError(f"k is {k}, must be at most {divergence.shape[-1]}, the number of heads")
    return divergence.topk(k, dim=-1).values.sum(-1).sum(0)
