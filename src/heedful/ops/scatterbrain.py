"""Sparse and low-rank attention in one: exact weights on a support, random features everywhere else."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heedful.checks import check_choice, check_mask, check_positive
from heedful.ops.linear import linear_attention
from heedful.patterns.pattern import Pattern
from heedful.selection import TokenGroups

Sharing = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_CELLS = 1 << 22  # scores and gathered numbers held in one go
_LEAST = 1e-24  # what the low-rank part outside the support is at least, before its scale


def orthogonal_projection(
    rows: int,
    dim: int,
    *,
    scaling: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "r d"]:
    """Random directions, orthogonal to each other in blocks of `dim` rows.

    scaling: 0, every row is as long as a fresh standard normal vector, so that features are unbiased;
    1, all rows have the length sqrt(dim). Raises ValueError on another.
    Source: Performer, arXiv 2009.14794; as in Scatterbrain, arXiv 2110.15343.
    """
    check_positive("rows", rows)
    check_choice("scaling", scaling, (0, 1))
    blocks = []
    for _ in range(-(-rows // dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, device=device, dtype=torch.float32))
        blocks.append((q * r.diagonal().sign()).mT)
    w = torch.cat(blocks)[:rows]
    if scaling == 0:
        w = w * torch.randn(rows, dim, device=device).norm(dim=-1, keepdim=True)
    else:
        w = w * dim**0.5
    return w if dtype is None else w.to(dtype)


def query_features(
    query: Float[Tensor, "b h n d"], projection: Float[Tensor, "r d"], scale: float
) -> tuple[Float[Tensor, "b h n f"], Float[Tensor, "b h n 1"]]:
    """(phi, log_scale) of queries: phi exp(log_scale) are the f = 2 r positive features of exp(scale q . k).

    The largest feature of every query is 1. The features of keys are `key_features`.
    """
    u, d = _exponents(query, projection, scale)
    top = u.amax(-1, keepdim=True).detach()
    return (u - top).exp(), top - d - _half_log(u.shape[-1])


def key_features(
    key: Float[Tensor, "b h m d"],
    projection: Float[Tensor, "r d"],
    scale: float,
    *,
    mask: Bool[Tensor, "b m"] | None = None,
    least: Float[Tensor, "b h 1 1"] | None = None,
) -> tuple[Float[Tensor, "b h m f"], Float[Tensor, "b h 1 1"]]:
    """(phi, log_scale) of keys, with one scale for all keys of a head.

        E over projections of (phi_q . phi_k) exp(log_scale_q + log_scale_k) = exp(scale q . k)

    mask: features of hidden keys are 0. least: the scale is at least this, that of keys before these.
    """
    u, d = _exponents(key, projection, scale)
    z = u - d - _half_log(u.shape[-1])
    if mask is not None:
        z = z.masked_fill(~mask[:, None, :, None], -torch.inf)
    b, h, m, _ = z.shape
    top = z.detach().amax((2, 3), keepdim=True) if m else z.new_full((b, h, 1, 1), -torch.inf)
    if least is not None:
        top = top.maximum(least)
    finite = top.masked_fill(top == -torch.inf, 0.0)  # no key at all
    return (z - finite).exp(), top if least is not None else finite


def _exponents(x: Tensor, projection: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    u = x @ projection.to(wide).mT * scale**0.5
    return torch.cat([u, -u], dim=-1), x.square().sum(-1, keepdim=True) * (scale / 2)


def _half_log(features: int) -> float:
    return math.log(features) / 2


def support_groups(pattern: Pattern, n: int, m: int, query_offset: int, block: int) -> TokenGroups:
    """A pattern as groups of `block` neighbouring queries, each query once, with the blocks they see."""
    table = pattern.block_table(n, m, block_size=(block, block), query_offset=query_offset)
    rows = torch.arange(table.count.shape[2] * block).view(1, 1, -1, block)
    live = torch.arange(table.index.shape[-1]) < table.count[..., None]
    columns = table.index[..., None] * block + torch.arange(block)
    columns = columns.masked_fill(~live[..., None] | (columns >= m), -1).flatten(3)
    return TokenGroups(rows.masked_fill(rows >= n, -1), columns, (n, m), table.mask_fn)


def scatterbrain_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    features: tuple[
        Float[Tensor, "b h n f"],
        Float[Tensor, "b h m f"],
        Float[Tensor, "b h n 1"],
    ],
    low_rank: Float[Tensor, "b h n v"],
    supports: Sequence[TokenGroups],
    *,
    scale: float,
    key_mask: Bool[Tensor, "b m"] | None = None,
    sharing: Sharing | None = None,
) -> Float[Tensor, "b h n e"]:
    """Attention with the weights A / sum(A) of each row, where

        A_ij = exp(scale q_i . k_j)                           on the support
        A_ij = (phi_q_i . phi_k_j) exp(L_i)                   elsewhere

    computed as the low-rank part over everything, plus exact minus low-rank on the support.

    features  phi of the queries, phi of the keys, and L, the sum of their log-scales
    low_rank  sum over all visible keys of (phi_q . phi_k) [v, 1], (b, h, n, e + 1): `linear_attention`
    supports  groups in which every query stands at most once; a pair may be in several of them
    key_mask  True = may be seen; phi of other keys must be 0
    sharing   (batch, head, row, column) -> in how many supports a pair of a group is; None: in one

    Scores are held for a few groups at a time and computed anew in the backward pass.
    Source: Scatterbrain, arXiv 2110.15343.
    """
    phi_query, phi_key, level = features
    check_mask("key_mask", key_mask, query.shape[0], key.shape[2])
    wide = phi_query.dtype
    given = (query.to(wide), key.to(wide), value.to(wide), phi_query, phi_key, level)
    # 1. On each support, with a common reference c for what is exact and what is low-rank.
    parts = [_on_support(given, support, scale, key_mask, sharing) for support in supports]
    tops = torch.stack([top for _, _, top in parts])
    exact = torch.stack([e for e, _, _ in parts])
    low = torch.stack([p for _, p, _ in parts]).sum(0)
    # 2. The supports together: their references c join to G.
    reference = tops.logsumexp(0)
    exact = ((tops - reference).exp()[..., None] * exact).sum(0)
    # 3. What is low-rank outside of the supports.
    rest = low_rank - low
    rest = torch.cat([rest[..., :-1], rest[..., -1:].clamp(min=_LEAST)], dim=-1)
    total = exact + rest * (level - reference[..., None]).exp()
    return (total[..., :-1] / total[..., -1:].clamp(min=torch.finfo(wide).tiny)).to(query.dtype)


Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _on_support(
    given: Given, support: TokenGroups, scale: float, key_mask: Tensor | None, sharing: Sharing | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the support of exp(s - c) [v, 1] and of P [v, 1], (b, h, n, e + 1); and c (b, h, n)."""
    query, _, value, phi_query, _, level = given
    b, h, n, d = query.shape
    device = query.device
    rows = support.query_index.to(device).expand(b, h, -1, -1)
    columns = support.key_index.to(device).expand(b, h, -1, -1)
    groups, lq, lk = rows.shape[2], rows.shape[3], columns.shape[3]
    cells = b * h * (lq * lk * 3 + lk * (d + value.shape[-1] + phi_query.shape[-1]))
    step = max(1, _CELLS // max(1, cells))
    pieces = []
    for start in range(0, groups if lk else 0, step):
        part = slice(start, start + step)
        run = functools.partial(
            _tile,
            rows=rows[:, :, part],
            columns=columns[:, :, part],
            mask_fn=support.mask_fn,
            scale=scale,
            key_mask=key_mask,
            sharing=sharing,
        )
        if step < groups and torch.is_grad_enabled():
            pieces.append(checkpoint(run, *given, use_reentrant=False))
        else:
            pieces.append(run(*given))
    # A query that stands in no group has nothing exact: its reference is its low-rank level.
    width = value.shape[-1] + 1
    sums = [value.new_zeros(b, h, n + 1, width) for _ in range(2)]
    top = torch.cat([level[..., 0].detach(), level.new_zeros(b, h, 1)], dim=-1)
    if pieces:
        exact, low, tops = (torch.cat(x, dim=2).flatten(2, 3) for x in zip(*pieces, strict=True))
        where = (rows % (n + 1)).flatten(2)  # pads go one place behind the end
        index = where[..., None].expand(-1, -1, -1, width)
        sums = [
            s.scatter(2, index, x.masked_fill((where == n)[..., None], 0))
            for s, x in zip(sums, (exact, low), strict=True)
        ]
        top = top.scatter(2, where, tops)
    return sums[0][:, :, :n], sums[1][:, :, :n], top[:, :, :n]


def _tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor,
    phi_key: Tensor,
    level: Tensor,
    *,
    rows: Tensor,
    columns: Tensor,
    mask_fn: Sharing | None,
    scale: float,
    key_mask: Tensor | None,
    sharing: Sharing | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Some groups: (exact, low) (b, h, g, lq, e + 1) and the references (b, h, g, lq)."""
    ib = torch.arange(rows.shape[0], device=rows.device)[:, None, None, None]
    ih = torch.arange(rows.shape[1], device=rows.device)[:, None, None]
    row, column = rows.clamp(min=0), columns.clamp(min=0)
    seen = (columns >= 0)[..., None, :]
    if key_mask is not None:
        seen = seen & key_mask[ib, column][..., None, :]
    pair = (ib[..., None], ih[..., None], row[..., None], column[..., None, :])
    if mask_fn is not None:
        seen = seen & mask_fn(*pair)
    scores = query[ib, ih, row] @ key[ib, ih, column].mT * scale
    low = phi_query[ib, ih, row] @ phi_key[ib, ih, column].mT
    if sharing is not None:
        times = sharing(*pair).clamp(min=1).to(scores.dtype)  # pairs of pads are in no support
        scores, low = scores - times.log(), low / times
    scores, low = scores.masked_fill(~seen, -torch.inf), low.masked_fill(~seen, 0.0)
    top = scores.detach().amax(-1).maximum(level[ib, ih, row][..., 0].detach())
    values = torch.nn.functional.pad(value[ib, ih, column], (0, 1), value=1.0)
    return (scores - top[..., None]).exp() @ values, low @ values, top


def low_rank_sums(
    phi_query: Float[Tensor, "b h n f"],
    phi_key: Float[Tensor, "b h m f"],
    value: Float[Tensor, "b h m e"],
    *,
    causal: bool,
) -> Float[Tensor, "b h n v"]:
    """sum_j (phi_q . phi_k_j) [v_j, 1] over all keys, or over those up to the query's own place."""
    values = torch.nn.functional.pad(value.to(phi_key.dtype), (0, 1), value=1.0)
    sums = linear_attention(phi_query, phi_key, values, causal=causal)
    assert isinstance(sums, Tensor)
    return sums
