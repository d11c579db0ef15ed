"""Leaving out heads of expert attention that are seldom taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from heedful.mixers.heads.shrp import ExpertAttention


def heads_to_keep(usage: Shaped[Tensor, " h"], share: float) -> list[int]:
    """The fewest heads, most used first, that together serve at least `share` of the tokens; ascending.

    Raises ValueError unless 0 < share <= 1. Source: SHRP, arXiv 2512.20635; the rule is ours.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, must be above 0 and at most 1")
    order = usage.argsort(descending=True, stable=True)
    served = usage[order].cumsum(0)
    count = int((served < share * usage.sum()).sum()) + 1
    return sorted(order[:count].tolist())


@torch.no_grad()
def prune_heads(mixer: ExpertAttention, keep: Sequence[int]) -> ExpertAttention:
    """A new mixer with some heads of a given one; tokens that took another take the best of those left.

    With one head left there is no router, and the gate is 1. Raises ValueError for an empty or wrong `keep`.
    Source: SHRP, arXiv 2512.20635.
    """
    kept = sorted(set(keep))
    if not kept or kept[0] < 0 or kept[-1] >= mixer.heads:
        raise ValueError(f"keep is {list(keep)}, must name some of the heads 0 to {mixer.heads - 1}")
    like = mixer.query.weight
    pruned = ExpertAttention(
        mixer.dim,
        heads=len(kept),
        head_dim=mixer.head_dim,
        hidden=mixer.hidden,
        route=mixer.route,
        load_balance=mixer.load_balance,
        dropout=mixer.dropout,
        device=like.device,
        dtype=like.dtype,
    )
    rows = torch.tensor([h * mixer.head_dim + i for h in kept for i in range(mixer.head_dim)])
    rows = rows.to(like.device)
    state = mixer.state_dict()
    for name in ("query", "key", "value"):
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = state[f"{name}.{kind}"][rows]
    if mixer.router is not None:
        router = state.pop("router.weight")[kept]
        if pruned.router is not None:
            state["router.weight"] = router
    pruned.load_state_dict(state)
    return pruned.train(mixer.training)
