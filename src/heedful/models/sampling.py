"""From logits to the next token, and on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    if not temperature >= 0:  # neither is not-a-number
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


def continue_ids(
    step: Callable[[Tensor], Tensor],
    ids: Int[Tensor, "b n"],
    max_new_tokens: int,
    *,
    eos: int | None = None,
    **how: Any,
) -> Int[Tensor, "b m"]:
    """The ids and what follows: `step` takes the prompt, then each new token, to the logits of the last.

    A row that gives `eos` is finished and filled with it; all finished ends it early. how: see `sample`.
    Raises ValueError if there is nothing to continue, or by no token.
    """
    check_positive("max_new_tokens", max_new_tokens)
    if ids.shape[1] == 0:
        raise ValueError("ids has no tokens, must have at least 1 to continue")
    if eos is not None and not isinstance(eos, int):
        raise ValueError(f"eos is {eos!r}, must be one token, a whole number")
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    piece = ids
    for _ in range(max_new_tokens):
        token = sample(step(piece), **how)
        if eos is not None:
            token = token.masked_fill(finished, eos)
            finished = finished | (token == eos)
        piece = token[:, None]
        ids = torch.cat([ids, piece], dim=1)
        if finished.all():
            break
    return ids
