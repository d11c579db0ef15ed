"""PyTorch's FlexAttention, driven by the same patterns and block tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from heedful.ops.call import Call
from heedful.patterns.pattern import Pattern
from heedful.selection import FULL, BlockTable, TokenGroups

_BLOCK = 128


def unsupported(call: Call) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if isinstance(call.selection, TokenGroups):
        return "takes no token groups"
    if isinstance(call.selection, BlockTable) and any(z % _BLOCK for z in call.selection.block_size):
        return f"takes block sizes that are multiples of {_BLOCK}, not {call.selection.block_size}"
    if call.dropout_p:
        return "has no dropout"
    tensors = [call.query, call.key, call.value, call.sink_logits]
    if (
        not call.query.is_cuda
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
    ):
        return "cannot train on a CPU"
    if call.bias is not None:
        return "takes no additive bias tensors"
    if call.query.dtype == torch.float64:
        return "has no float64"
    if not call.query.is_cuda and _needs_lse(call):
        return "gives no log-sum-exp (and so no sink) on a CPU"
    return None


def _needs_lse(call: Call) -> bool:
    return call.return_lse or call.sink_logits is not None


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    table, mask_mod = _table(call)
    if call.query.is_cuda:
        # A first look moves the tables of a pattern to the GPU, outside the compiled graph.
        zero = torch.zeros((), dtype=torch.int64, device=call.query.device)
        mask_mod(zero, zero, zero, zero)
    block_mask = None
    if table is not None:
        key_mask = call.key_mask
        if key_mask is not None:
            inner = mask_mod

            def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return inner(b, h, q, k) & key_mask[b, k]

        block_mask = _block_mask(table, mask_mod, call.key_mask is not None)
    query, key, value = call.query, call.key, call.value
    if not query.is_cuda:  # there is no gradient here, and FlexAttention refuses leaves that ask for one
        query, key, value = query.detach(), key.detach(), value.detach()
    options = {"block_mask": block_mask, "scale": call.scale, "enable_gqa": call.repeats > 1}
    if not _needs_lse(call):
        return _compiled()(query, key, value, **options), None
    out, lse = _compiled()(query, key, value, **options, return_lse=True)
    if call.sink_logits is not None:
        total = torch.logaddexp(lse, call.sink_logits.to(lse.dtype)[:, None])
        out, lse = out * (lse - total).exp()[..., None].to(out.dtype), total
    return out, lse


def _table(call: Call) -> tuple[BlockTable | None, Callable[..., Tensor]]:
    def everything(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= 0) & (k >= 0)

    device = call.query.device
    if isinstance(call.selection, Pattern):
        table = call.selection.block_table(
            call.n, call.m, block_size=(_BLOCK, _BLOCK), query_offset=call.query_offset, device=device
        )
        return table, table.mask_fn or everything
    if isinstance(call.selection, BlockTable):
        return call.selection, call.selection.mask_fn or everything
    if call.key_mask is None:
        return None, everything
    blocks = (1, 1, -(-call.n // _BLOCK), -(-call.m // _BLOCK))
    some = torch.ones(blocks, dtype=torch.bool, device=device)
    return BlockTable.from_tiles(some, some, (_BLOCK, _BLOCK), (call.n, call.m), everything), everything


def _block_mask(table: BlockTable, mask_mod: Callable[..., Tensor], all_partial: bool) -> BlockMask:
    n, m = table.shape
    bq, bk = table.block_size
    b, h, nq = table.count.shape
    nk = -(-m // bk)
    live = torch.arange(table.index.shape[-1], device=table.index.device) < table.count[..., None]
    full = live & (table.kind == FULL)
    # Blocks that are cut short, or seen through a key mask, need the mask even where the pattern is full.
    full &= torch.tensor(not all_partial, device=full.device)
    full &= (table.index + 1) * bk <= m
    if n % bq:
        full[:, :, -1] = False

    def lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
        count = chosen.sum(-1, dtype=torch.int32)
        order = (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)
        index = torch.zeros(b, h, nq, nk, dtype=torch.int32, device=chosen.device)
        index[..., : order.shape[-1]] = table.index.gather(-1, order).to(torch.int32)
        return count, index

    return BlockMask.from_kv_blocks(
        *lists(live & ~full), *lists(full), BLOCK_SIZE=(bq, bk), mask_mod=mask_mod, seq_lengths=(n, m)
    )


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
