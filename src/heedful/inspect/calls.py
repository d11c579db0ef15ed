"""Queries, keys, values and visibility of attention calls made in the ways of PyTorch and of heedful."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful.inspect.site import Visibility
from heedful.nn import MultiheadAttention
from heedful.ops.bias import FactoredBias
from heedful.ops.call import Call
from heedful.patterns import Causal, Pattern
from heedful.selection import BlockTable, TokenGroups


def of_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, float, Visibility]:
    """Of torch.nn.functional.scaled_dot_product_attention; axes before the heads become one batch."""
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
    query, key, value = (
        x.expand(*lead, *x.shape[-3:]).reshape(-1, *x.shape[-3:]) for x in (query, key, value)
    )
    bias = None
    if attn_mask is not None:
        bias = _as_bias(attn_mask, query)
        if bias.ndim > 4:
            bias = bias.expand(*lead, *bias.shape[-3:]).reshape(-1, *bias.shape[-3:])
    told = Visibility(pattern=Causal() if is_causal else None, bias=bias, key_mask=None, query_offset=0)
    return query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, told


def of_heedful(call: Call) -> tuple[Tensor, Tensor, Tensor, float, Visibility]:
    """Of heedful.attention, whatever its selection and bias."""
    call = call.widened()
    bias = call.bias
    assert not isinstance(bias, FactoredBias)
    pattern: Pattern | None = None
    offset = call.query_offset
    if isinstance(call.selection, Pattern):
        pattern = call.selection
    elif isinstance(call.selection, BlockTable):
        pattern, offset = _Table(call.selection), 0
    elif isinstance(call.selection, TokenGroups):
        groups, offset = _of_groups(call.selection, call.query), 0
        bias = groups if bias is None else bias + groups
    told = Visibility(pattern=pattern, bias=bias, key_mask=call.key_mask, query_offset=offset)
    return call.query, call.key, call.value, call.scale, told


class _Table(Pattern):
    """A block table, whose rows stand for positions."""

    def __init__(self, table: BlockTable) -> None:
        self.table = table
        # Block by block: 0 hidden, 1 partly, 2 wholly seen.
        lead = torch.broadcast_shapes(table.count.shape[:2], table.index.shape[:2])
        index, kind = (x.expand(*lead, *x.shape[2:]) for x in (table.index, table.kind))
        live = torch.arange(index.shape[-1], device=index.device) < table.count[..., None]
        blocks = -(-table.shape[1] // table.block_size[1])
        self.seen = torch.zeros(*index.shape[:3], blocks, dtype=torch.uint8, device=index.device)
        self.seen.scatter_add_(-1, index, live.expand(index.shape).to(torch.uint8) * (1 + kind))

    @property
    def batch(self) -> int:
        return self.seen.shape[0]

    @property
    def heads(self) -> int:
        return self.seen.shape[1]

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        rows, columns = self.table.block_size
        seen = self.seen[b, h, q // rows, k // columns]
        if self.table.mask_fn is None:
            return seen > 0
        return (seen == 2) | ((seen == 1) & self.table.mask_fn(b, h, q, k))

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a captured block table is read pair by pair")


def _of_groups(groups: TokenGroups, query: Tensor) -> Tensor:
    """What groups add to the logits: -inf outside, the keys' biases inside."""
    if groups.query_weight is not None:
        raise ValueError("this attention adds up several softmaxes a query; it has no one table of weights")
    bias = torch.where(groups.dense(), 0.0, -torch.inf).to(query)
    if groups.key_bias is None:
        return bias
    pairs = groups.pair_mask()
    lead = torch.broadcast_shapes(pairs.shape[:2], groups.key_bias.shape[:2])
    shape = (*lead, *pairs.shape[2:])
    row, column = groups.query_index[..., :, None].clamp(min=0), groups.key_index[..., None, :].clamp(min=0)
    cell = (row * groups.shape[1] + column).expand(shape).flatten(2)
    added = (groups.key_bias[..., None, :] * pairs).expand(shape).flatten(2).to(query)
    table = bias.new_zeros(*lead, groups.shape[0] * groups.shape[1]).scatter_add(-1, cell, added)
    return bias + table.unflatten(-1, groups.shape)


_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)
_SIGNATURE_OURS = inspect.signature(MultiheadAttention.forward)


def of_multihead(
    module: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, float, Visibility, bool]:
    """The call behind `module(*args, **kwargs)`; keys that the module appends are seen by all."""
    ours: Any = MultiheadAttention  # its way to read masks and weights serves PyTorch's own as well
    signature = _SIGNATURE_OURS if isinstance(module, MultiheadAttention) else _SIGNATURE
    bound = signature.bind(module, *args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    cross = given["key"] is not given["query"]
    query, key, value = (given[name] for name in ("query", "key", "value"))
    padding = given["key_padding_mask"]
    if query.ndim == 2:
        query, key, value = query[None], key[None], value[None]
        padding = None if padding is None else padding[None]
    elif not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    q, k, v = ours._project(module, query, key, value)
    n, m = q.shape[2], k.shape[2]
    bias, key_mask = ours._masks(module, given["attn_mask"], padding, (q.shape[0], n, m))
    pattern = given.get("pattern") or getattr(module, "pattern", None)
    if given["is_causal"] and given["attn_mask"] is None:
        pattern = Causal() if pattern is None else Causal() & pattern
    offset = m - n
    extra = ours._extra(module, q)
    if extra is not None:
        if pattern is not None:
            seen = _as_bias(pattern.mask(n, m, device=q.device), q)
            bias, pattern = (seen if bias is None else bias + seen), None
        more = extra[0].shape[2]
        k, v = torch.cat([k, extra[0]], dim=2), torch.cat([v, extra[1]], dim=2)
        bias = None if bias is None else F.pad(bias, (0, more))
        key_mask = None if key_mask is None else F.pad(key_mask, (0, more), value=True)
    told = Visibility(pattern=pattern, bias=bias, key_mask=key_mask, query_offset=offset)
    return q, k, v, module.head_dim**-0.5, told, cross


def _as_bias(mask: Tensor, query: Tensor) -> Tensor:
    """A mask of scaled_dot_product_attention (bool, True = visible, or added) with at least 4 axes."""
    if mask.dtype == torch.bool:
        mask = query.new_zeros(()).masked_fill(~mask, -torch.inf)
    return mask[(None,) * max(0, 4 - mask.ndim)]
