"""Routing by chunks of any length: blocks of queries spend a budget of keys on those they like best."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.checks import check_positive
from heedful.registry import register
from heedful.selection import TokenGroups


def chunk_scores(
    query: Float[Tensor, "b g d"],
    key: Float[Tensor, "b n d"],
    start: Int[Tensor, "b g2 c"],
    stop: Int[Tensor, "b g2 c"],
    *,
    norm: bool = True,
) -> Float[Tensor, "b g c"]:
    """query . (mean of the keys of a chunk) sqrt(its length), of chunks [start, stop); g2 is 1 or g.

    norm=False leaves the square root out. Empty chunks get -inf. The scores carry no gradient.
    """
    wide = torch.promote_types(key.dtype, torch.float32)
    sums = F.pad(key.detach().to(wide).cumsum(1), (0, 0, 1, 0))
    length = stop - start
    rows = torch.arange(key.shape[0], device=key.device)[:, None, None]
    total = sums[rows, stop] - sums[rows, start]
    mean = total / length.clamp(min=1).to(wide)[..., None] ** (0.5 if norm else 1.0)
    if mean.shape[1] == 1:
        scores = query.detach().to(wide) @ mean[:, 0].mT
    else:
        scores = (mean @ query.detach().to(wide)[..., None])[..., 0]
    return scores.masked_fill(length <= 0, -torch.inf)


def best_tokens(
    scores: Float[Tensor, "b g c"],
    start: Int[Tensor, "b g2 c"],
    stop: Int[Tensor, "b g2 c"],
    low: Int[Tensor, " g"],
    high: Int[Tensor, " g"],
    slots: Int[Tensor, " g"],
    most: int,
) -> Int[Tensor, "b g s"]:
    """Tokens of the best chunks, `slots` <= most for each row, of those in [low, high); -1 fills up.

    Of the last chunk that is taken the first tokens are, and of equal scores the chunk that comes first.
    """
    b, g, c = scores.shape
    most = _largest(slots, most)
    if c == 0 or most == 0:
        return torch.full((b, g, most), -1, device=scores.device)
    first, last = start.maximum(low[:, None]), stop.minimum(high[:, None])
    length = (last - first).clamp(min=0).expand(b, g, c)
    order = scores.masked_fill(length == 0, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    first, length = first.expand(b, g, c).gather(-1, order), length.gather(-1, order)
    end = length.cumsum(-1)
    slot = torch.arange(most, device=scores.device).expand(b, g, most).contiguous()
    which = torch.searchsorted(end, slot, right=True).clamp(max=c - 1)
    token = first.gather(-1, which) + slot - (end - length).gather(-1, which)
    return token.masked_fill((slot >= end[..., -1:]) | (slot >= slots[:, None]), -1)


@register(
    "chunk-topk", kind="routing", paper="dhsa", tags=("sparse", "chunks"), complexity="O(N / B chunks C)"
)
def chunk_topk(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h2 m d"],
    boundaries: Int[Tensor, "b c"],
    *,
    block_size: int,
    budget: int,
    local_tokens: int = 128,
    global_tokens: int = 128,
    window: int | None = None,
    norm: bool = True,
    authors_duplicates: bool = False,
    query_offset: int = 0,
) -> Int[Tensor, "b g k"]:
    """The keys of each block of queries as published: the chunks with the best scores, within a budget.

        score(block, chunk) = mean query . mean key of the chunk * sqrt(length of the chunk)

    query       the queries that are routed, all heads together: their mean is scored
    boundaries  ascending, 0 first and m last: chunk c is boundaries[c] .. boundaries[c + 1] - 1
    budget      keys a block sees: the last `local_tokens`, `global_tokens` first ones, the rest by score
    window      of a sliding layer: block i sees the last `window` keys before its end alone
    norm        False: without the square root
    authors_duplicates  the budget is spent without thought of global tokens, which then take the place of the
                first entries; they may repeat keys, and what is not needed repeats the last key. Else keys
                are all different and -1 fills up
    query_offset  key position of query 0

    A block sees keys up to its own end, so that its queries and chunks of its own future have a say: this
    rule is not causal. Give the result to `key_groups` for `heedful.attention`. No gradient passes.
    Source: DHSA, arXiv 2510.24606.
    """
    for name, value in (("block_size", block_size), ("budget", budget)):
        check_positive(name, value)
    n, m = query.shape[2], key.shape[2]
    count = -(-n // block_size)
    device = query.device
    blocks = F.pad(query.mean(1), (0, 0, 0, -n % block_size)).unflatten(1, (count, block_size)).sum(2)
    start, stop = boundaries[:, None, :-1], boundaries[:, None, 1:]
    scores = chunk_scores(blocks, key.mean(1), start, stop, norm=norm)
    budget = min(budget, m, m if window is None else window)
    high = (query_offset + (torch.arange(count, device=device) + 1) * block_size).clamp(max=m)
    low = torch.zeros_like(high) if window is None else (high - window).clamp(min=0)
    local = (high - low).clamp(max=min(local_tokens, budget))
    pinned = torch.zeros_like(local)
    if not authors_duplicates:
        pinned = (high - low - local).clamp(max=global_tokens).minimum(budget - local)
    picked = best_tokens(scores, start, stop, low + pinned, high - local, budget - local - pinned, budget)
    found = with_ends(picked, low, pinned, high, local, budget)
    if authors_duplicates:
        found = torch.where(found < 0, m - 1, found).sort(-1).values
        found = F.pad(found, (0, budget - found.shape[-1]), value=m - 1)[..., :budget]
        first = torch.zeros_like(high) if window is None else (high - block_size - window).clamp(min=0)
        ends = (first[:, None] + torch.arange(global_tokens, device=device)).minimum(high[:, None] - 1)
        found[..., :global_tokens] = ends[:, :budget]
    return found


def with_ends(
    picked: Int[Tensor, "b g s"],
    low: Int[Tensor, " g"],
    pinned: Int[Tensor, " g"],
    high: Int[Tensor, " g"],
    local: Int[Tensor, " g"],
    budget: int,
) -> Int[Tensor, "b g k"]:
    """The picked keys, the `pinned` ones from low on and the `local` ones before high, ascending, -1 last.

    They must be different, and no more than `budget` together.
    """
    ends = []
    for first, length in ((low, pinned), (high - local, local)):
        step = torch.arange(_largest(length, budget), device=picked.device)
        ends.append(
            torch.where(step < length[:, None], first[:, None] + step, -1).expand(len(picked), -1, -1)
        )
    found = torch.cat([ends[0], picked, ends[1]], dim=-1)
    far = torch.iinfo(found.dtype).max
    found = found.masked_fill(found < 0, far).sort(-1).values
    found = found[..., : _largest((found < far).sum(-1), budget)]
    return found.masked_fill(found == far, -1)


def _largest(x: Int[Tensor, "..."], limit: int) -> int:
    """The largest entry, at least 0. A compiled call takes the limit, which does not depend on the data."""
    if torch.compiler.is_compiling():
        return limit
    return max(0, int(x.max())) if x.numel() else 0


def key_groups(
    keys: Int[Tensor, "b g k"], *, block_size: int, n: int, m: int, offset: int = 0, first: int = 0
) -> TokenGroups:
    """The selection in which block g of queries sees its keys, but none that comes later than the query.

    offset  key position of query 0;  first: key position of the first block's first query
    A key that stands twice in its row takes weight twice.
    """
    g = keys.shape[1]
    device = keys.device
    rows = (first - offset + torch.arange(g * block_size, device=device)).view(g, block_size)
    rows = torch.where((rows >= 0) & (rows < n), rows, -1)
    keys = torch.where(keys < m, keys, -1)
    seen, times = _once(keys)
    bias = times.log()[:, None].to(torch.float32) if _largest(times, 2) > 1 else None
    return TokenGroups(
        rows[None, None], seen[:, None], (n, m), lambda b, h, row, column: column <= row + offset, bias
    )


def _once(keys: Int[Tensor, "b g k"]) -> tuple[Int[Tensor, "b g k"], Int[Tensor, "b g k"]]:
    """The keys, ascending, each at its first place alone; and how often it stood there."""
    keys = keys.sort(-1).values
    again: Bool[Tensor, "b g k"] = F.pad(keys[..., 1:] == keys[..., :-1], (1, 0))
    run = (~again).long().cumsum(-1) - 1
    times = torch.zeros_like(keys).scatter_add(-1, run, torch.ones_like(keys)).gather(-1, run)
    return keys.masked_fill(again, -1), times.masked_fill(again | (keys < 0), 1)
