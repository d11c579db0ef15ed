"""How spread out attention is."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heedful.registry import register


@register("attention-entropy", kind="inspect", paper="vit-visual-analytics", tags=("entropy",))
def attention_entropy(
    weights: Float[Tensor, "*b r m"], *, visible: Bool[Tensor, "*c r m"] | None = None
) -> Float[Tensor, "*b r"]:
    """The entropy of each row of weights in nats: -sum_j A_ij log A_ij; 0 where all goes to one key.

    visible: if given, the entropy is a share of its largest value, the logarithm of the number of keys that
    the query may see: 0 for one key, 1 for uniform attention; 0 in rows that see one key or none.
    """
    entropy = torch.special.entr(weights).sum(-1)
    if visible is None:
        return entropy
    most = visible.sum(-1).clamp(min=1).to(weights.dtype).log()
    return torch.where(most > 0, entropy / most.clamp(min=torch.finfo(most.dtype).tiny), 0.0)
