"""Jump search: each query scores keys at distances that grow like squares, and looks around the best."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heedful.checks import check_positive
from heedful.registry import register

_CHUNK = 1 << 18  # products held at a time


def jump_distances(length: int, *, window_index: int = 0, power: int = 2) -> list[int]:
    """Distances i ** power - 1 < length of the stripes i = window_index + 1, window_index + 2, ..."""
    check_positive("power", power)
    found = []
    i = window_index + 1
    while i**power <= length:
        found.append(i**power - 1)
        i += 1
    return found


@register(
    "jump-search",
    kind="routing",
    paper="superlinear",
    tags=("sparse", "search"),
    complexity="O(N^(1 + 1/P) C), P the power",
)
def jump_search(
    query: Float[Tensor, "b hq n d"],
    key: Float[Tensor, "b hkv m d"],
    *,
    spans: int = 3,
    window_index: int = 0,
    power: int = 2,
    query_offset: int | None = None,
) -> tuple[Int[Tensor, "b hq n s"], Float[Tensor, "b hq n s"]]:
    """The keys, among those at jump distances, that a query likes best, and their scores, best first.

        z_i = q . k[position - i ** power + 1],  i = window_index + 1, window_index + 2, ...  while in reach

    Scores are not scaled. The choice passes no gradient; the scores of what is chosen do, to query and key.
    Where fewer than `spans` keys are in reach the rest is -1 with a score of -inf.

    query_offset  key position of query 0; defaults to m - n
    Source: Superlinear Multi-Step Attention, arXiv 2601.18401.
    """
    check_positive("spans", spans)
    b, hq, n, d = query.shape
    hkv, m = key.shape[1:3]
    offset = m - n if query_offset is None else query_offset
    distances = jump_distances(offset + n, window_index=window_index, power=power)
    wide = torch.promote_types(query.dtype, torch.float32)
    r = hq // hkv
    with torch.no_grad():
        picked = [
            _best(
                query[:, :, a:z].to(wide).unflatten(1, (hkv, r)), key.to(wide), distances, offset + a, spans
            )
            for a, z in _pieces(n, b * hq * d)
        ]
    stripe = torch.cat(picked, dim=2).view(b, hq, n, spans)
    position = torch.arange(offset, offset + n, device=query.device)[:, None]
    reach = torch.tensor([*distances, 0], device=query.device)[stripe]  # -1 takes the last entry
    anchor = torch.where(stripe >= 0, position - reach, -1)
    # The same scores once more, of the few that were chosen, for the gradient.
    where = anchor.clamp(min=0).unflatten(1, (hkv, r)).flatten(2)[..., None].expand(-1, -1, -1, d)
    chosen = key.gather(2, where).view(b, hkv, r, n, spans, d).flatten(1, 2)
    score = (query.to(wide)[..., None, :] * chosen.to(wide)).sum(-1)
    return anchor, score.masked_fill(anchor < 0, -torch.inf)


def _pieces(n: int, cells: int) -> list[tuple[int, int]]:
    step = max(64, _CHUNK // max(1, cells))
    return [(a, min(a + step, n)) for a in range(0, n, step)] or [(0, 0)]


def _best(query: Tensor, key: Tensor, distances: list[int], start: int, spans: int) -> Tensor:
    """Stripe numbers (b, h, n, spans), best first, -1 for none, of queries at start, start + 1, ..."""
    n = query.shape[3]
    stripes = sum(reach < start + n for reach in distances)
    scores = query.new_full((max(stripes, spans), *query.shape[:4]), -torch.inf)
    for s, reach in enumerate(distances[:stripes]):
        skip = max(0, reach - start)  # queries that stand before this distance
        keys = key[:, :, None, start + skip - reach : start + n - reach]
        torch.sum(query[:, :, :, skip:] * keys, -1, out=scores[s, ..., skip:])
    # Of equal scores `max` takes the first, which is the nearest.
    picked = []
    for _ in range(spans):
        value, stripe = scores.max(dim=0)
        picked.append(stripe.masked_fill(value == -torch.inf, -1))
        scores.scatter_(0, stripe[None], -torch.inf)
    return torch.stack(picked, dim=-1).flatten(1, 2)


def jump_spans(
    anchor: Int[Tensor, "b h n s"],
    *,
    window_index: int = 0,
    power: int = 2,
    backward: float = 2.0,
    forward: float = 0.0,
    span_power: float = 0.5,
    query_offset: int = 0,
) -> tuple[Int[Tensor, "b h n s"], Int[Tensor, "b h n s"]]:
    """First and last key of the span around each anchor; first 0 and last -1 where there is none.

        first = max(0, a - ceil(backward t ** span_power)),  last = min(a + ceil(forward t ** span_power), t
        - 1)

    t counts the query's tokens so far, itself included. A span ends before the window of the last
    (window_index + 1) ** power - 1 tokens.
    Source: Superlinear Multi-Step Attention, arXiv 2601.18401.
    """
    position = torch.arange(query_offset, query_offset + anchor.shape[2], device=anchor.device)[:, None]
    root = (position + 1).double() ** span_power
    before, after = ((factor * root).ceil().long() for factor in (backward, forward))
    end = (position - ((window_index + 1) ** power - 1)).clamp(min=-1) if window_index else position
    first, last = (anchor - before).clamp(min=0), (anchor + after).minimum(end)
    none = (anchor < 0) | (last < first)
    return first.masked_fill(none, 0), last.masked_fill(none, -1)
