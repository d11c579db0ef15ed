"""Mixture of block attention: each query sees its own chunk and chunks whose mean key it likes.

Chunks of lines, images and video come from `heedful.routing.block_topk.grid_blocks`.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.checks import check_choice, check_positive
from heedful.registry import register
from heedful.routing.block_topk import block_means
from heedful.selection import TokenGroups

# What competes for one budget: axes of the scores (heads, chunks, queries) as (budgets, competitors).
_SCOPES = {
    "query_head": "h c n -> (h n) c",
    "head_global": "h c n -> h (c n)",
    "block": "h c n -> c (h n)",
    "overall": "h c n -> 1 (h c n)",
}
_TILE = 128  # queries of a group


@register(
    "moba-chunks",
    kind="routing",
    paper="vmoba",
    tags=("sparse", "block", "video"),
    complexity="O(N G C), G chunks",
)
def moba_chunks(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    chunks: Int[Tensor, "c l"],
    *,
    select: str = "threshold",
    scope: str = "head_global",
    threshold: float = 0.25,
    topk: int = 3,
    samples: Int[Tensor, " n"] | None = None,
    legacy: bool = False,
) -> TokenGroups:
    """Each query sees its own chunk and the chunks whose mean key it likes best.

        gate_cs = mean_c(k) . q_s;  own: s lies in c;  valid: c and s are of one sample
        topk:      the topk largest gates for each query, own gates first
        threshold: g = (gate - min) / (max - min) over the valid gates of a scope, sums over the scope,
                   the other entries by falling g up to the first whose running share of sum(g) reaches
                   threshold - (sum of own g) / sum(g), this one included

    The result is a `pattern` for `heedful.attention`. Every batch row is selected by itself, without
    gradient, in float32 at least.

    chunks     token numbers of each chunk, -1 pads; every token in one chunk
    select     "threshold" or "topk"
    scope      what competes: "query_head" the chunks of one query and head, "head_global" all pairs of chunk
               and query of a head, "overall" those of all heads, "block" (threshold alone) all queries and
               heads of a chunk
    threshold  share of the similarity that is covered
    topk       chunks seen by a query, in the mean over the scope, its own included
    samples    for several samples packed into one row: the number of each token's sample
    legacy     as the authors' code, every query sees all of its sample where nobody picked any chunk

    Raises ValueError on unknown choices, or a topk or threshold that is not positive.
    Source: VMoBA, arXiv 2506.23858.
    """
    check_choice("select", select, ("threshold", "topk"))
    check_choice(
        "scope", scope, tuple(_SCOPES) if select == "threshold" else ("query_head", "head_global", "overall")
    )
    check_positive("topk", topk)
    if threshold <= 0:
        raise ValueError(f"threshold is {threshold}, must be positive")
    b, h, n, _ = query.shape
    own, valid = _own_and_valid(chunks, n, samples)
    wide = torch.promote_types(query.dtype, torch.float32)
    means = block_means(key.detach().to(wide), chunks)
    seen = torch.zeros(b, h, len(chunks), n, dtype=torch.bool, device=query.device)
    # Heads that compete for nothing with each other are looked at one by one: gates are large.
    together = 1 if scope in ("query_head", "head_global") else max(h, 1)
    for row in range(b):
        for first in range(0, h, together):
            heads = slice(first, first + together)
            with torch.autocast(query.device.type, enabled=False):
                gate = means[row, heads] @ query[row, heads].detach().to(wide).mT
            g, mine, fits = (rearrange(x.expand(gate.shape), _SCOPES[scope]) for x in (gate, own, valid))
            if select == "topk":
                chosen = _largest(g, mine, fits, min(topk, len(chunks)) * g.shape[-1] // len(chunks))
            else:
                chosen = _until(g, mine, fits, threshold)
            left, right = _SCOPES[scope].split(" -> ")
            sizes = dict(zip("hcn", gate.shape, strict=True))
            seen[row, heads] = rearrange(chosen, f"{right} -> {left}", **sizes)
    others = valid & ~own
    seen &= others
    if legacy and not bool(seen.any()):
        seen |= others
    return chunk_groups(seen | own, chunks)


def chunk_groups(
    seen: Bool[Tensor, "b h c n"], chunks: Int[Tensor, "c l"], *, tile: int = _TILE
) -> TokenGroups:
    """The selection in which queries see the tokens of their chunks: up to `tile` queries of a chunk a group.

    A query stands in one group for each chunk that it sees, and takes one softmax over all of them.
    Source: VMoBA, arXiv 2506.23858.
    """
    b, h, c, n = seen.shape
    count = seen.sum(-1).flatten()  # queries of each batch row, head and chunk
    tile = max(1, min(tile, int(count.max()))) if count.numel() else tile
    needed = -(-count // tile)
    place = needed.view(b * h, c).cumsum(1).flatten() - needed  # number of a chunk's first group
    most = int(needed.view(b * h, c).sum(1).max()) if count.numel() else 0
    which, query = seen.flatten(0, 2).nonzero(as_tuple=True)
    rank = torch.arange(len(which), device=seen.device) - (count.cumsum(0) - count)[which]
    group = which // c * most + place[which] + rank // tile
    queries = torch.full((b * h * most * tile,), -1, device=seen.device)
    queries[group * tile + rank % tile] = query
    keys = torch.full((b * h * most, chunks.shape[1]), -1, device=seen.device)
    begins = rank % tile == 0
    keys[group[begins]] = chunks[which[begins] % c]
    return TokenGroups(queries.view(b, h, most, tile), keys.view(b, h, most, chunks.shape[1]), (n, n))


def _own_and_valid(
    chunks: Int[Tensor, "c l"], n: int, samples: Int[Tensor, " n"] | None
) -> tuple[Bool[Tensor, "c n"], Bool[Tensor, "c n"]]:
    """Which tokens lie in each chunk, and which are of its sample."""
    chunk, slot = (chunks >= 0).nonzero(as_tuple=True)
    own = torch.zeros(len(chunks), n, dtype=torch.bool, device=chunks.device)
    own[chunk, chunks[chunk, slot]] = True
    if samples is None:
        return own, torch.ones_like(own)
    first = chunks.max(1).values  # any token of the chunk
    return own, samples[first][:, None] == samples


def _largest(
    gate: Float[Tensor, "g e"], own: Bool[Tensor, "g e"], valid: Bool[Tensor, "g e"], most: int
) -> Bool[Tensor, "g e"]:
    """The `most` largest entries of each scope, own ones first."""
    gate = gate.masked_fill(~valid, -torch.inf).masked_fill(own, torch.inf)
    return torch.zeros_like(own).scatter(-1, gate.topk(most, dim=-1).indices, True)


def _until(
    gate: Float[Tensor, "g e"], own: Bool[Tensor, "g e"], valid: Bool[Tensor, "g e"], threshold: float
) -> Bool[Tensor, "g e"]:
    """The largest entries of each scope until, with the own ones, they have a `threshold` of the sum."""
    low = gate.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    high = gate.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    span = torch.where(high - low <= 1e-6, 1.0, high - low)
    g = ((gate - low) / span).masked_fill(~valid, 0)
    total = g.sum(-1, keepdim=True) + 1e-6
    missing = (threshold - (g * own).sum(-1, keepdim=True) / total).clamp(min=0)
    # What cannot be chosen comes last. The authors count it as 0, and leave ties with 0 to the sort.
    ordered, order = g.masked_fill(own | ~valid, -1).sort(-1, descending=True)
    reached = ordered.clamp(min=0).cumsum(-1) / total >= missing
    last = torch.where(reached.any(-1), reached.int().argmax(-1), g.shape[-1] - 1)
    chosen = torch.arange(g.shape[-1], device=g.device) <= last[:, None]
    return torch.zeros_like(own).scatter(-1, order, chosen)
