"""Softmax in two steps: over the tokens at hand and the landmarks of past blocks, then inside each block."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heedful.checks import check_mask, check_positive
from heedful.ops.attention import attention, merge_partials
from heedful.patterns.blocks import Blocks
from heedful.patterns.causal import Causal
from heedful.routing.spans import span_groups

_CHUNK = 1 << 23  # scores with past blocks held in one go


def landmark_softmax(
    scores: Float[Tensor, "b h n m"], is_landmark: Bool[Tensor, "b m"]
) -> Float[Tensor, "b h n m"]:
    """Attention weights of grouped softmax with landmarks, dense and literal; they sum to 1.

        w_j = p_j                        tokens of the query's own block
        w_j = p_j * p(landmark of b)     tokens of a past block b
        w_j = 0                          landmarks, and what comes later

    One softmax p runs over the own block and the landmarks of past blocks together, and one over the
    tokens of each past block. A landmark closes its block; a query's own block begins after the last
    landmark before it, and hides its landmark.

    scores       scaled logits; query i stands at key position i + m - n
    is_landmark  landmarks may stand anywhere
    Source: Landmark Attention, arXiv 2305.16300.
    """
    n, m = scores.shape[2:]
    check_mask("is_landmark", is_landmark, scores.shape[0], m)
    block = is_landmark.long().cumsum(-1) - is_landmark.long()
    column = torch.arange(m, device=scores.device)
    row = torch.arange(m - n, m, device=scores.device)
    own = block[:, None, None, :] == block[:, None, row, None]
    mark = is_landmark[:, None, None, :]
    seen = (column <= row[:, None]) & ~(mark & own)
    first_group = int(block.max()) + 1 if m else 0
    group = torch.where(own | mark, first_group, block[:, None, None, :])
    p = _group_softmax(scores, group.expand(scores.shape), seen, first_group + 1)
    place = block[:, None, None, :].expand(scores.shape)
    marks = p.masked_fill(~(mark & seen), 0.0)
    share = p.new_zeros(*p.shape[:3], first_group + 1).scatter_add(-1, place, marks).gather(-1, place)
    return torch.where(own, p, p * share).masked_fill(mark | ~seen, 0.0)


def _group_softmax(scores: Tensor, group: Tensor, seen: Tensor, groups: int) -> Tensor:
    """Softmax over the seen columns of each group; 0 elsewhere."""
    scores = scores.masked_fill(~seen, -torch.inf)
    empty = scores.new_full((*scores.shape[:3], groups), -torch.inf)
    top = empty.scatter_reduce(-1, group, scores.detach(), "amax")
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (scores - top.gather(-1, group)).exp()
    total = torch.zeros_like(top).scatter_add(-1, group, weights)
    return weights / total.masked_fill(total == 0, 1.0).gather(-1, group)


def landmark_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    *,
    block_size: int,
    retrieve: int | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
    query_offset: int | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Float[Tensor, "b h n e"] | tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """Attention with the weights of `landmark_softmax` where every block has `block_size` tokens.

        out = attention over the own block  joined by log-sum-exp with
              sum_b softmax_b(q . landmark_b) * sum_j softmax_j in b(q . k_j) v_j

    block_size    tokens of a block; its landmark comes behind them: keys block_size, 2 block_size + 1 ...
    retrieve      past blocks that a query of a head sees, those with the largest q . landmark; None: all. The
                  choice passes no gradient
    key_mask      True = may be seen; a block none of whose tokens may be seen hides its landmark
    query_offset  key position of query 0; defaults to m - n
    return_lse    also the log-sum-exp over the own block and the landmarks

    Scores are scaled by d ** -0.5. The cost is O(n m) without `retrieve`; scores are held for a few rows at a
    time, and computed anew in the backward pass.
    Source: Landmark Attention, arXiv 2305.16300.
    """
    check_positive("block_size", block_size)
    if retrieve is not None:
        check_positive("retrieve", retrieve)
    b, h, n, _ = query.shape
    m, length = key.shape[2], block_size + 1
    check_mask("key_mask", key_mask, b, m)
    offset = m - n if query_offset is None else query_offset
    if n == 0:
        out, lse = value[:, :, :0], query.new_zeros(b, h, 0)
        return (out, lse) if return_lse else out

    ordinary = torch.arange(m, device=key.device) % length < block_size
    ordinary = ordinary.expand(b, m) if key_mask is None else ordinary & key_mask
    own = attention(
        query,
        key,
        value,
        pattern=Causal() & Blocks(m, length),
        key_mask=ordinary,
        query_offset=offset,
        dropout_p=dropout_p,
        return_lse=True,
    )
    parts = [own]
    count = (offset + n - 1) // length  # blocks that the last query may see
    if retrieve is not None and retrieve < count:
        marks = key[:, :, length - 1 : count * length : length]
        may = ordinary[:, : count * length].unflatten(1, (count, length)).any(-1)
        chosen = best_blocks(query, marks, retrieve, length, query_offset=offset, block_mask=may)
        parts += _fetched_blocks(query, key, value, marks, chosen, ordinary, length, dropout_p)
    elif count > 0:
        keys, values = (x[:, :, : count * length].unflatten(2, (count, length)) for x in (key, value))
        tokens = None if key_mask is None else key_mask[:, : count * length].unflatten(1, (count, length))
        parts.append(_past_blocks(query, keys, values, tokens, offset, dropout_p))
    out, lse = merge_partials(parts)  # type: ignore[arg-type]
    return (out, lse) if return_lse else out


@torch.no_grad()
def best_blocks(
    query: Float[Tensor, "b h n d"],
    landmark: Float[Tensor, "b h k d"],
    keep: int,
    length: int,
    *,
    query_offset: int = 0,
    block_mask: Bool[Tensor, "b k"] | None = None,
) -> Int[Tensor, "b h n keep"]:
    """The `keep` blocks with the largest q . landmark among those that end before the query; -1: no more."""
    b, h, n, _ = query.shape
    count = landmark.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    place = torch.arange(count, device=query.device)
    rows = max(16, _CHUNK // max(1, b * h * count))
    parts = []
    for start in range(0, n, rows):
        part = query[:, :, start : start + rows]
        position = torch.arange(start, start + part.shape[2], device=query.device) + query_offset
        seen = place < (position // length)[:, None]
        if block_mask is not None:
            seen = seen & block_mask[:, None, None]
        scores = (part.to(wide) @ landmark.to(wide).mT).masked_fill(~seen, -torch.inf)
        best = scores.topk(keep, dim=-1)
        parts.append(best.indices.masked_fill(best.values == -torch.inf, -1))
    return torch.cat(parts, 2)


def _fetched_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmark: Tensor,
    chosen: Tensor,
    mask: Tensor,
    length: int,
    dropout_p: float,
) -> list[tuple[Tensor, Tensor]]:
    """(out, score of the landmark) over each of the chosen blocks (b, h, n, keep)."""
    n, keep = chosen.shape[2:]
    none = chosen < 0
    first = chosen.clamp(min=0) * length
    last = torch.where(none, -1, first + length - 2)
    # A query stands once for each of its blocks; queries of one block make up a group.
    groups = span_groups(first.flatten(2), last.flatten(2), key.shape[2], tile=length, rows=64)
    if not torch.compiler.is_compiling():
        groups = replace(groups, mask_fn=None)  # a group's queries see all of its keys
    out = attention(
        query.repeat_interleave(keep, dim=2),
        key,
        value,
        pattern=groups,
        key_mask=mask,
        dropout_p=dropout_p,
    )
    wide = torch.promote_types(query.dtype, torch.float32)
    parts = []
    for i, one in enumerate(out.unflatten(2, (n, keep)).unbind(3)):
        where = chosen[..., i, None].clamp(min=0).expand(-1, -1, -1, landmark.shape[-1])
        score = (query.to(wide) * landmark.gather(2, where).to(wide)).sum(-1) * query.shape[-1] ** -0.5
        parts.append((one, score.masked_fill(none[..., i], -torch.inf)))
    return parts


def _past_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, offset: int, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) over the blocks that end before each query; key (b, h, blocks, block_size + 1, d)."""
    b, h, n, _ = query.shape
    count, length = key.shape[2:4]
    rows = max(16, _CHUNK // max(1, b * h * count * length))
    parts = []
    for start in range(0, n, rows):
        part = query[:, :, start : start + rows]
        position = torch.arange(start, start + part.shape[2], device=query.device) + offset
        seen = (offset + start + part.shape[2] - 1) // length  # blocks that the last row of this part sees
        past = torch.arange(seen, device=query.device) < (position // length)[:, None]
        run = functools.partial(_look_back, past=past, dropout_p=dropout_p)
        given = (part, key[:, :, :seen], value[:, :, :seen], None if mask is None else mask[:, :seen])
        if rows < n and torch.is_grad_enabled():
            parts.append(checkpoint(run, *given, use_reentrant=False))
        else:
            parts.append(run(*given))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _look_back(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, past: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ key.to(dtype).flatten(2, 3).mT * query.shape[-1] ** -0.5
    tokens = None
    if mask is not None:
        tokens = mask[:, None, None, :, :-1]
        past = past & tokens.any(-1)
    weights, lse = two_step_weights(scores.unflatten(-1, key.shape[2:4]), past, tokens)
    weights = torch.dropout(weights, dropout_p, True)
    return (weights.flatten(-2) @ value[..., :-1, :].to(dtype).flatten(2, 3)).to(query.dtype), lse


def two_step_weights(
    scores: Float[Tensor, "b h n k l"],
    blocks: Bool[Tensor, "..."] | None = None,
    tokens: Bool[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, "b h n k l-1"], Float[Tensor, "b h n"]]:
    """Weights of the tokens of whole blocks, whose landmark is the last; and the landmarks' log-sum-exp.

        w[k, j] = softmax over blocks(score of landmark k) * softmax in block k(score of token j)

    blocks (..., k) and tokens (..., k, l - 1): which may be seen; None: all. A query that sees no block has
    weights of zero and lse = -inf.
    """
    inner, marks = scores[..., :-1], scores[..., -1]
    low = torch.finfo(scores.dtype).min  # finite, so that rows without anything to see stay free of NaN
    if tokens is not None:
        inner = inner.masked_fill(~tokens, low)
    if blocks is not None:
        marks = marks.masked_fill(~blocks, low)
    inner, share, lse = inner.softmax(-1), marks.softmax(-1), marks.logsumexp(-1)
    if tokens is not None:
        inner = inner.masked_fill(~tokens, 0.0)
    if blocks is not None:
        share = share.masked_fill(~blocks, 0.0)
        lse = lse.masked_fill(~blocks.any(-1), -torch.inf)
    return inner * share[..., None], lse
