"""How much the last queries of a call attend to each key: what policies score their entries by."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.hf.attention import Visibility


def last_weights(*args: Tensor, **told: Any) -> Float[Tensor, "b hq last m"]:
    """Attention weights, in float32, of the last queries; zeros in rows that see nothing."""
    return last_log_weights(*args, **told).exp()


def last_log_weights(
    query: Float[Tensor, "b hq n d"],
    key: Float[Tensor, "b hkv m d"],
    *,
    last: int,
    scale: float,
    told: Visibility,
) -> Float[Tensor, "b hq last m"]:
    """Logarithms of the attention weights of the last `last` queries, in float32; -inf where nothing is seen.

    They tell apart what is too little for the weights themselves, so that a choice never hangs on ties.

    told  who sees whom in the whole call
    """
    n, m = query.shape[2], key.shape[2]
    first = n - last
    grouped = query[:, :, first:].unflatten(1, (key.shape[1], -1))
    logits = (grouped.float() @ key[:, :, None].float().mT * scale).flatten(1, 2)
    if (bias := told["bias"]) is not None:
        logits = logits + (bias[..., first:, :] if bias.shape[-2] > 1 else bias).float()
    if (pattern := told["pattern"]) is not None:
        b = torch.arange(pattern.batch, device=query.device)[:, None, None, None]
        h = torch.arange(pattern.heads, device=query.device)[:, None, None]
        q = torch.arange(first, n, device=query.device)[:, None] + told["query_offset"]
        seen = pattern.visible(b, h, q, torch.arange(m, device=query.device))
        logits = logits.masked_fill(~seen, -torch.inf)
    if (key_mask := told["key_mask"]) is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
    return logits.log_softmax(-1).masked_fill(logits == -torch.inf, -torch.inf)
