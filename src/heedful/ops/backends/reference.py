"""Dense and literal attention: the specification that every other backend must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.ops.bias import FactoredBias
from heedful.ops.call import Call
from heedful.selection import TokenGroups


def unsupported(call: Call) -> str | None:
    return None


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """softmax(scale q k^T + bias over visible keys and the sink) v, and its log-sum-exp."""
    # Half precision is computed in float32, as every fused kernel does.
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    key = call.key.to(dtype).repeat_interleave(call.repeats, dim=1)
    value = call.value.to(dtype).repeat_interleave(call.repeats, dim=1)
    logits = call.query.to(dtype) @ key.transpose(-1, -2) * call.scale
    if isinstance(call.bias, FactoredBias):
        logits = logits + call.bias.dense().to(dtype)
    elif call.bias is not None:
        logits = logits + call.bias.to(dtype)
    if isinstance(call.selection, TokenGroups) and (
        call.selection.query_weight is not None or call.selection.key_bias is not None
    ):
        return _groups(call, call.selection, logits, value)
    out, lse = _softmax(call, logits, call.mask(), value)
    return out.to(call.query.dtype), lse


def _softmax(call: Call, logits: Tensor, seen: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor]:
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    if call.sink_logits is not None:
        sink = call.sink_logits.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        lse = torch.cat([logits, sink], dim=-1).logsumexp(-1)
    elif call.m:
        # A row that sees nothing has no slope: through its log-sum-exp it would be NaN.
        blind = (logits == -torch.inf).all(-1)
        lse = logits.masked_fill(blind[..., None], 0.0).logsumexp(-1).masked_fill(blind, -torch.inf)
    else:
        lse = logits.new_full(logits.shape[:3], -torch.inf)
    # exp(-inf - -inf) would be NaN: such a row is measured from 0 instead.
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return torch.dropout(weights, call.dropout_p, True) @ value, lse


def _groups(call: Call, groups: TokenGroups, logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Groups with key biases or weights of their own, one after the other."""
    b, h, n, m = logits.shape
    pairs = groups.pair_mask().expand(b, h, -1, -1, -1)
    if call.key_mask is not None:
        keys = call.key_mask[
            torch.arange(b, device=logits.device)[:, None, None, None], groups.key_index.clamp(min=0)
        ]
        pairs = pairs & keys[:, :, :, None, :]
    count = pairs.shape[2]
    rows = groups.query_index.clamp(min=0).expand(b, h, -1, -1)
    columns = groups.key_index.clamp(min=0).expand(b, h, -1, -1)
    union = logits.new_full((b, h, n, m), -torch.inf)
    total = torch.zeros_like(call.query[..., :1].to(logits.dtype) * value[:, :, :1, :])
    total = total.expand(b, h, n, value.shape[-1]).clone()
    ib = torch.arange(b, device=logits.device)[:, None, None, None]
    ih = torch.arange(h, device=logits.device)[None, :, None, None]
    for g in range(count):
        row, column, seen = rows[:, :, g, :, None], columns[:, :, g, None, :], pairs[:, :, g]
        part = logits[ib, ih, row, column]
        if groups.key_bias is not None:
            part = part + groups.key_bias.to(part.dtype)[:, :, g, None, :]
        if groups.query_weight is None:
            where = torch.broadcast_tensors(ib, ih, row, column)
            union = union.index_put(tuple(w[seen] for w in where), part[seen])
        else:
            picked = value[ib[..., 0], ih[..., 0], columns[:, :, g]]
            out, _ = _softmax(call, part, seen, picked)
            live = (groups.query_index[:, :, g] >= 0).to(part.dtype)
            out = out * (groups.query_weight[:, :, g].to(part.dtype) * live)[..., None]
            total = total.scatter_add(2, rows[:, :, g, :, None].expand_as(out), out)
    if groups.query_weight is not None:
        return total.to(call.query.dtype), None
    out, lse = _softmax(call, union, None, value)
    return out.to(call.query.dtype), lse
