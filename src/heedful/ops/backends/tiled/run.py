"""Which way a call is computed: a walk over runs of keys, or gathered groups."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from heedful.ops.backends import reference
from heedful.ops.backends.tiled import gather, tile, walk
from heedful.ops.backends.tiled.plan import Masks, Plan, Row, Segment, make_plans, pattern_plans
from heedful.ops.call import Call
from heedful.patterns.pattern import Pattern
from heedful.selection import FULL, BlockTable, TokenGroups

_KEPT_CELLS = 64 << 20  # pairs of a static selection whose mask is kept between calls
_pair_masks: WeakKeyDictionary[TokenGroups, Tensor] = WeakKeyDictionary()


def unsupported(call: Call) -> str | None:
    """Why this backend cannot serve the call, or None: it serves every call."""
    return None


@torch.compiler.disable
def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the call. Differentiable once: a second backward raises an error that says so."""
    if call.query.numel() == 0 or call.m == 0:
        return reference.run(call)  # nothing to walk over
    dtype = call.query.dtype
    call = call.widened()
    selection = call.selection
    if isinstance(selection, Pattern):
        groups = selection.groups(call.n, call.m, call.query_offset, call.query.device)
        selection = groups if groups is not None else selection
    if isinstance(selection, TokenGroups):
        out, lse = _groups(call, selection)
    elif isinstance(selection, BlockTable) and selection.count.shape[:2] != (1, 1):
        out, lse = _scattered_blocks(call, selection)
    else:
        out, lse = _walk(call, selection)
    return out.to(dtype), lse


def _seed(call: Call) -> int:
    return int(torch.randint(1 << 31, (1,))) if call.dropout_p else 0


def _walk(call: Call, selection: Pattern | BlockTable | None) -> tuple[Tensor, Tensor]:
    if isinstance(selection, Pattern):
        plans = pattern_plans(selection, call.n, call.m, call.query_offset)
    elif selection is not None:
        plans = make_plans(selection)
    else:
        plans = _whole(call.n, call.m)
    fused = tile.can_fuse(call.query, call.value)
    job = walk.Job(plans, call.scale, call.repeats, call.key_mask, call.dropout_p, _seed(call), fused)
    return walk.Walk.apply(call.query, call.key, call.value, call.bias, call.sink_logits, job)


def _whole(n: int, m: int) -> list[Plan]:
    """Everything visible: no table is needed."""
    segment = Segment(((0, m),), False)
    rows = tuple(Row(i, min(i + 512, n), (segment,)) for i in range(0, n, 512))
    zero = torch.zeros(1, 1, 1, dtype=torch.int64)
    table = BlockTable(zero, zero[..., None], zero[..., None].to(torch.uint8), (max(n, 1), max(m, 1)), (n, m))
    return [Plan(table, rows, None, None, True, Masks())]


def _groups(call: Call, groups: TokenGroups) -> tuple[Tensor, Tensor]:
    extras = (groups.query_index, groups.key_index, groups.key_bias)
    shared = all(t is None or t.shape[:2] == (1, 1) for t in extras) and call.bias is None
    if shared:
        return _shared_groups(call, groups)
    query_index, key_index = _per_head(call, groups.query_index), _per_head(call, groups.key_index)
    b, h, g = query_index.shape[:3]
    rows, columns = query_index.flatten(0, 2), key_index.flatten(0, 2)
    full = torch.full(rows.shape[:1], groups.mask_fn is None, device=rows.device)
    flat = _Flat(call, rows, columns, _owner(b, h, g, rows.device), full, groups.mask_fn)
    extra = flat.bias()
    if groups.key_bias is not None:
        key_bias = _per_head(call, groups.key_bias).flatten(0, 2)[None, :, None, :]
        extra = key_bias if extra is None else extra + key_bias
    out, lse = flat.attend(extra)
    weight = None if groups.query_weight is None else _per_head(call, groups.query_weight).flatten(0, 2)[None]
    return _combine(call, out, lse, flat.query_tokens(), weight, planes=1)


def _shared_groups(call: Call, groups: TokenGroups) -> tuple[Tensor, Tensor]:
    """All heads and batch rows have the same groups: index once, and fold query heads into their KV head."""
    b, h, n, _ = call.query.shape
    r = call.repeats
    index, columns = groups.query_index[0, 0], groups.key_index[0, 0]
    tokens = torch.cat([torch.where(index >= 0, index + i * n, -1) for i in range(r)], dim=1)
    key_mask = None
    if call.key_mask is not None:
        key_mask = call.key_mask.repeat_interleave(h // r, dim=0)

    def visible(first: int, last: int) -> Tensor | None:
        seen = None if groups.mask_fn is None else _pairs(groups, first, last).repeat(1, 1, r, 1)
        if key_mask is None:
            return seen
        cut = columns[first:last]
        keys = key_mask[:, cut.clamp(min=0)] & (cut >= 0)
        return keys[:, :, None, :] if seen is None else seen & keys[:, :, None, :]

    job = gather.Job(gather.Groups(tokens, columns, visible), call.scale, call.dropout_p, _seed(call))
    extra = None if groups.key_bias is None else groups.key_bias[0, :, :, None, :]
    out, lse = gather.Gather.apply(
        call.query.reshape(b * (h // r), r * n, -1),
        call.key.flatten(0, 1),
        call.value.flatten(0, 1),
        extra,
        job,
    )
    weight = groups.query_weight
    if weight is not None:
        # (b|1, h|1, g, lq) to (planes, g, r * lq), in the order of `tokens`
        weight = _per_head(call, weight).reshape(b, h // r, r, *weight.shape[2:])
        weight = weight.transpose(2, 3).reshape(b * (h // r), weight.shape[3], -1)
    return _combine(call, out, lse, tokens, weight, planes=b * (h // r))


def _pairs(groups: TokenGroups, first: int, last: int) -> Tensor:
    """The mask (1, groups, lq, lk) of some of the groups; kept between calls while it is small."""
    cells = groups.query_index.numel() * groups.key_index.shape[-1]
    if cells <= _KEPT_CELLS:
        if groups not in _pair_masks:
            _pair_masks[groups] = groups.pair_mask()[0]
        return _pair_masks[groups][:, first:last]
    part = replace(
        groups,
        query_index=groups.query_index[:, :, first:last],
        key_index=groups.key_index[:, :, first:last],
        key_bias=None,
        query_weight=None,
    )
    return part.pair_mask()[0]


def _per_head(call: Call, x: Tensor) -> Tensor:
    return x.expand(call.query.shape[0], call.heads, *x.shape[2:])


def _owner(b: int, h: int, g: int, device: torch.device) -> Tensor:
    """The number b * heads + h of each group."""
    return torch.arange(b * h, device=device).repeat_interleave(g)


class _Flat:
    """Groups that differ by batch row or head: all tokens of all heads form one plane."""

    def __init__(
        self, call: Call, rows: Tensor, columns: Tensor, owner: Tensor, full: Tensor, mask_fn: object
    ) -> None:
        # rows (g, lq) and columns (g, lk) count inside a head; full (g,) or (g, lk): no pair is hidden
        self.call, self.rows, self.columns, self.owner = call, rows, columns, owner
        self.full, self.mask_fn = full, mask_fn
        self.batch, self.head = owner // call.heads, owner % call.heads

    def query_tokens(self) -> Tensor:
        return torch.where(self.rows >= 0, self.rows + (self.owner * self.call.n)[:, None], -1)

    def key_tokens(self) -> Tensor:
        call = self.call
        plane = self.batch * (call.heads // call.repeats) + self.head // call.repeats
        return torch.where(self.columns >= 0, self.columns + (plane * call.m)[:, None], -1)

    def visible(self, first: int, last: int) -> Tensor | None:
        part = slice(first, last)
        rows, columns, full = self.rows[part], self.columns[part], self.full[part]
        seen: Tensor | None = None
        if self.mask_fn is not None and not bool(full.all()):
            b, h = self.batch[part, None, None], self.head[part, None, None]
            seen = self.mask_fn(b, h, rows.clamp(min=0)[:, :, None], columns.clamp(min=0)[:, None, :])  # type: ignore[operator]
            if bool(full.any()):
                seen = seen | (full[:, None, :] if full.ndim == 2 else full[:, None, None])
        keys = columns >= 0
        if self.call.key_mask is not None:
            keys = keys & self.call.key_mask[self.batch[part, None], columns.clamp(min=0)]
        if not bool(keys.all()):
            seen = keys[:, None, :] if seen is None else seen & keys[:, None, :]
        return None if seen is None else seen[None]

    def bias(self) -> Tensor | None:
        """The dense bias of the call at the pairs of the groups, (1, g, lq, lk)."""
        bias = self.call.bias
        if bias is None:
            return None
        assert isinstance(bias, Tensor)
        where = (
            self.batch[:, None, None],
            self.head[:, None, None],
            self.rows.clamp(min=0)[:, :, None],
            self.columns.clamp(min=0)[:, None, :],
        )
        at = tuple(w if size > 1 else torch.zeros_like(w) for w, size in zip(where, bias.shape, strict=True))
        return bias[at][None]

    def attend(self, extra: Tensor | None) -> tuple[Tensor, Tensor]:
        call = self.call
        groups = gather.Groups(self.query_tokens(), self.key_tokens(), self.visible)
        job = gather.Job(groups, call.scale, call.dropout_p, _seed(call))
        flat = [x.reshape(1, -1, x.shape[-1]) for x in (call.query, call.key, call.value)]
        return gather.Gather.apply(*flat, extra, job)


def _scattered_blocks(call: Call, table: BlockTable) -> tuple[Tensor, Tensor]:
    """A table that differs by batch row or head; rows with similar numbers of blocks go together."""
    bq, bk = table.block_size
    n, m = table.shape
    count, index, kind = (_per_head(call, t).flatten(0, 2) for t in (table.count, table.index, table.kind))
    device = count.device
    blocks = table.count.shape[2]
    start = torch.arange(blocks, device=device) * bq
    rows = start[:, None] + torch.arange(bq, device=device)
    rows = torch.where(rows < n, rows, -1).repeat(call.query.shape[0] * call.heads, 1)
    owner = _owner(call.query.shape[0], call.heads, blocks, device)
    outs, lses, tokens = [], [], []
    # Buckets by powers of two: at most half of a bucket is padding.
    bucket = torch.ceil(torch.log2(count.clamp(min=1).double())).long()
    for level in bucket.unique().tolist():
        chosen = (bucket == level).nonzero()[:, 0]
        most = int(count[chosen].max())
        live = torch.arange(most, device=device) < count[chosen, None]
        columns = index[chosen, :most, None] * bk + torch.arange(bk, device=device)
        columns = torch.where(live[..., None] & (columns < m), columns, -1).flatten(1)
        full = (kind[chosen, :most] == FULL).repeat_interleave(bk, dim=1) | (table.mask_fn is None)
        flat = _Flat(call, rows[chosen], columns, owner[chosen], full, table.mask_fn)
        out, lse = flat.attend(flat.bias())
        outs.append(out)
        lses.append(lse)
        tokens.append(flat.query_tokens())
    return _combine(call, torch.cat(outs, 1), torch.cat(lses, 1), torch.cat(tokens), None, planes=1)


def _combine(
    call: Call, out: Tensor, lse: Tensor, tokens: Tensor, weight: Tensor | None, planes: int
) -> tuple[Tensor, Tensor]:
    """From groups (p, g, lq, ...) back to (b, h, n, ...). tokens (g, lq) are numbers in a plane."""
    b, h, n, _ = call.query.shape
    total = b * h * n // planes
    live = tokens >= 0
    if weight is not None:
        share = (weight * live)[..., None].to(out.dtype)
        flat = out.new_zeros(planes, total, out.shape[-1])
        flat = flat.index_add(1, tokens.clamp(min=0).flatten(), (out * share).flatten(1, 2))
        return flat.view(b, h, n, -1), lse.new_zeros(())
    times = torch.bincount(tokens[live], minlength=total)
    if int(times.max()) <= 1:
        flat_out = gather.scatter(out, tokens, total)
        flat_lse = gather.scatter(lse, tokens, total)
        blind = times == 0
        if bool(blind.any()):
            flat_lse = flat_lse.masked_fill(blind, -torch.inf)
    else:
        flat_out, flat_lse = _merge(out, lse, tokens, total)
    out, lse = flat_out.view(b, h, n, -1), flat_lse.view(b, h, n)
    if call.sink_logits is not None:
        sink = call.sink_logits.to(lse.dtype)[:, None]
        joined = torch.logaddexp(lse, sink)
        out, lse = out * (lse - joined).exp()[..., None].to(out.dtype), joined
    return out, lse


def _merge(out: Tensor, lse: Tensor, tokens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """One softmax over all keys of a query that stands in several groups."""
    where = tokens.clamp(min=0).flatten()
    lse = lse.masked_fill(tokens < 0, -torch.inf).flatten(1)
    top = lse.new_full((lse.shape[0], total), -torch.inf)
    top = top.scatter_reduce(1, where.expand(lse.shape), lse.detach(), "amax")
    top = top.masked_fill(top == -torch.inf, 0.0)
    share = (lse - top[:, where]).exp()
    mass = torch.zeros_like(top).index_add(1, where, share)
    blind = mass == 0
    mass = mass.masked_fill(blind, 1.0)
    flat = out.flatten(1, 2) * share[..., None].to(out.dtype)
    joined = out.new_zeros(out.shape[0], total, out.shape[-1]).index_add(1, where, flat)
    return joined / mass[..., None].to(out.dtype), (top + mass.log()).masked_fill(blind, -torch.inf)
