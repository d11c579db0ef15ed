"""From the logits of the last token to the next one."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heedful.checks import check_positive


def sample(
    logits: Float[Tensor, "b v"],
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " b"]:
    """The next token of each row, drawn from softmax(logits / temperature); the likeliest at temperature 0.

    top_k  only the k likeliest tokens
    top_p  only the likeliest tokens that together just reach this probability, at least one

    Raises ValueError on a negative temperature, top_k below 1, and top_p outside (0, 1].
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, must be at least 0")
    if top_k is not None:
        check_positive("top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, must be above 0 and at most 1")
    if temperature == 0:
        return logits.argmax(-1)
    probability, token = (logits.float() / temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
    kept = torch.ones_like(probability, dtype=torch.bool)
    if top_k is not None:
        kept[:, top_k:] = False
    if top_p is not None:
        probability = probability * kept
        probability = probability / probability.sum(-1, keepdim=True)
        kept &= probability.cumsum(-1) - probability < top_p
    drawn = torch.multinomial(probability * kept, 1, generator=generator)
    return token.gather(-1, drawn)[:, 0]
