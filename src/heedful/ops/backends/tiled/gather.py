"""Attention of groups of queries with gathered keys, many groups at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from heedful.ops.backends.tiled import tile
from heedful.ops.once import differentiable_once

_CELLS = 1 << 22  # gathered numbers and logits held at a time


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups over flattened planes: every plane has the same groups.

    query_index (g, lq), key_index (g, lk): tokens of a plane, -1 pads. visible(first, last) gives the
    mask (1|planes, groups, lq, lk) of the groups [first, last), or None if all pairs are visible.
    """

    query_index: Tensor
    key_index: Tensor
    visible: Callable[[int, int], Tensor | None]


@dataclass(frozen=True, eq=False)
class Job:
    groups: Groups
    scale: float
    dropout_p: float
    seed: int


class Gather(Function):
    """(out, lse) per group: (p, g, lq, e) and (p, g, lq), for planes of query (p, n, d), key (p, m, d),
    value (p, m, e); extra (1|p, g, 1|lq, lk) or None is added to the logits."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, extra: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor]:
        # index_select would copy the whole of a strided tensor, for every chunk.
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        g, lq = job.groups.query_index.shape
        planes = query.shape[0]
        out = query.new_zeros(planes, g, lq, value.shape[-1])
        lse = query.new_full(
            (planes, g, lq), -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32)
        )
        for chunk in _chunks(query, key, value, extra, job):
            part = slice(chunk.first, chunk.last)
            out[:, part], lse[:, part] = tile.forward(
                chunk.query,
                chunk.key,
                chunk.value,
                chunk.additive,
                job.scale,
                chunk.keep(),
                chunk.fused,
                chunk.blind(),
            )
        ctx.save_for_backward(query, key, value, extra, out, lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @differentiable_once(tile.ONCE)
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, extra, out, lse = ctx.saved_tensors
        job: Job = ctx.job
        if grad is None:
            grad = torch.zeros_like(out)
        safe = lse.masked_fill(lse == -torch.inf, 0.0)
        wide = lse.dtype
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (query, key, value))
        want_extra = extra is not None and ctx.needs_input_grad[3]
        dextra = torch.zeros_like(extra, dtype=wide) if want_extra else None
        for chunk in _chunks(query, key, value, extra, job):
            part = slice(chunk.first, chunk.last)
            tq, tk, tv, ts = tile.backward(
                grad[:, part],
                None if grad_lse is None else grad_lse[:, part],
                chunk.query,
                chunk.key,
                chunk.value,
                out[:, part],
                safe[:, part],
                chunk.additive,
                job.scale,
                chunk.keep(),
                chunk.fused,
                want_extra,
            )
            # Pads point at token 0 with gradient 0: their logits are -inf, their outputs unread.
            dq.index_add_(1, chunk.rows, chunk.only_live(tq).flatten(1, 2).to(wide))
            dk.index_add_(1, chunk.columns, tk.flatten(1, 2).to(wide))
            dv.index_add_(1, chunk.columns, tv.flatten(1, 2).to(wide))
            if dextra is not None and ts is not None:
                view = dextra[:, part]
                for axis in (0, 2):
                    if view.shape[axis] == 1:
                        ts = ts.sum(axis, keepdim=True)
                view += ts
        if dextra is not None:
            dextra = dextra.to(extra.dtype)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dextra, None


class _Chunk:
    def __init__(
        self, first: int, last: int, query: Tensor, key: Tensor, value: Tensor, extra: Tensor | None, job: Job
    ) -> None:
        self.first, self.last, self.job = first, last, job
        rows, columns = job.groups.query_index[first:last], job.groups.key_index[first:last]
        self.rows, self.columns = rows.clamp(min=0).flatten(), columns.clamp(min=0).flatten()
        self.live = rows >= 0
        planes, count = query.shape[0], last - first
        self.query = query.index_select(1, self.rows).view(planes, count, -1, query.shape[-1])
        self.key = key.index_select(1, self.columns).view(planes, count, -1, key.shape[-1])
        self.value = value.index_select(1, self.columns).view(planes, count, -1, value.shape[-1])
        self.fused, self.extra = tile.can_fuse(query, value), extra is not None
        self.additive = self._additive(columns, extra)

    def _additive(self, columns: Tensor, extra: Tensor | None) -> Tensor | None:
        dtype = self.query.dtype if self.fused else torch.promote_types(self.query.dtype, torch.float32)
        seen = self.job.groups.visible(self.first, self.last)
        if seen is None and bool((columns < 0).any()):
            seen = (columns >= 0)[None, :, None, :]
        self.seen = seen
        total: Tensor | None = None
        if seen is not None:
            # 1 - 1 / seen is 0 or -inf; on a CPU torch.where takes ten times as long.
            total = seen.view(torch.uint8).to(dtype).reciprocal_().neg_().add_(1)
        if extra is not None:
            part = extra[:, self.first : self.last].to(dtype)
            total = part if total is None else total + part
        return None if total is None else total.expand(-1, -1, self.query.shape[2], -1)

    def blind(self) -> Tensor | None:
        """The rows that see nothing; None if there is none."""
        if self.extra:
            return tile.blind_rows(self.additive)
        if self.seen is None:
            return None
        blind = self.seen.view(torch.uint8).amax(-1) == 0  # any(-1), but faster
        if not bool(blind.any()):
            return None
        return blind.expand(-1, -1, self.query.shape[2])

    def only_live(self, x: Tensor) -> Tensor:
        return x if bool(self.live.all()) else x * self.live[None, :, :, None]

    def keep(self) -> Tensor | None:
        """Dropout factors, the same in forward and backward."""
        if self.job.dropout_p == 0.0:
            return None
        device = self.query.device
        generator = torch.Generator(device).manual_seed(self.job.seed + self.first)
        draw = torch.rand(*self.query.shape[:3], self.key.shape[2], generator=generator, device=device)
        return (draw >= self.job.dropout_p).to(draw.dtype) / (1.0 - self.job.dropout_p)


def _chunks(query: Tensor, key: Tensor, value: Tensor, extra: Tensor | None, job: Job) -> Iterator[_Chunk]:
    g, lq = job.groups.query_index.shape
    lk = job.groups.key_index.shape[1]
    cells = query.shape[0] * max(1, lk * (key.shape[-1] + value.shape[-1]) + lq * lk)
    step = max(1, _CELLS // cells)
    for first in range(0, g, step):
        yield _Chunk(first, min(first + step, g), query, key, value, extra, job)


def scatter(parts: Tensor, index: Tensor, n: int) -> Tensor:
    """parts (p, g, lq, ...) to (p, n, ...), where no token stands in two groups; others get 0."""
    live = index >= 0
    flat = parts.flatten(1, 2)
    target = parts.new_zeros(parts.shape[0], n, *parts.shape[3:])
    where = index.flatten()
    if not bool(live.all()):
        chosen = live.flatten().nonzero()[:, 0]
        flat, where = flat.index_select(1, chosen), where[chosen]
    return target.index_copy(1, where, flat)
