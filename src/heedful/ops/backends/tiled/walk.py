"""Attention that walks over query blocks and reads runs of keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from heedful.ops.backends.tiled import tile
from heedful.ops.backends.tiled.plan import Plan, Row, Segment
from heedful.ops.once import differentiable_once

_PLAIN_COLUMNS = 4096  # columns of a tile whose scores are held, where no fused kernel serves


@dataclass(frozen=True, eq=False)
class Job:
    """What a walk needs besides tensors that take gradients. repeats: query heads a KV head."""

    plans: list[Plan]
    scale: float
    repeats: int
    key_mask: Tensor | None
    dropout_p: float
    seed: int
    fused: bool


class Walk(Function):
    """(out, lse) of attention over the plans of a job.

    query (b, hkv * repeats, n, d), key (b, hkv, m, d), value (b, hkv, m, e), bias (b|1, h|1, n|1, m|1)
    or None, sink (h,) or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        sink: Tensor | None,
        job: Job,
    ) -> tuple[Tensor, Tensor]:
        b, h, n, _ = query.shape
        out = query.new_empty(b, h, n, value.shape[-1])
        lse = query.new_full((b, h, n), -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
        for visit in _visits(query, key, value, bias, job):
            rows = slice(visit.row.start, visit.row.stop)
            parts = []
            for at, (segment, k, v, additive) in enumerate(visit.tiles()):
                keep, blind = visit.keep(at, segment), visit.blind(segment, additive)
                parts.append(tile.forward(visit.query, k, v, additive, job.scale, keep, visit.fused, blind))
            if not parts:
                visit.view(out)[:, :, rows] = 0.0
                continue
            part_out, part_lse = parts[0] if len(parts) == 1 else _merge(parts)
            visit.view(out)[:, :, rows] = visit.unfold(part_out)
            visit.view(lse)[:, :, rows] = visit.unfold(part_lse)
        if sink is not None:
            total = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
            out = out * (lse - total).exp()[..., None].to(out.dtype)
            lse = total
        ctx.save_for_backward(query, key, value, bias, sink, out, lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @differentiable_once(tile.ONCE)
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, bias, sink, out, lse = ctx.saved_tensors
        job: Job = ctx.job
        if grad is None:
            grad = torch.zeros_like(out)
        wide = lse.dtype
        # Blind rows have lse -inf; every logit of theirs is -inf too, and exp(-inf - 0) is 0.
        safe = lse.masked_fill(lse == -torch.inf, 0.0)
        dq = torch.zeros_like(query)
        dk, dv = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        want_bias = bias is not None and ctx.needs_input_grad[3]
        dbias = torch.zeros_like(bias, dtype=wide) if want_bias else None
        for visit in _visits(query, key, value, bias, job):
            rows = slice(visit.row.start, visit.row.stop)
            g, o, s = (visit.fold(visit.view(x)[:, :, rows]) for x in (grad, out, safe))
            gl = None if grad_lse is None else visit.fold(visit.view(grad_lse)[:, :, rows])
            total: Tensor | None = None
            for at, (segment, k, v, additive) in enumerate(visit.tiles()):
                keep = visit.keep(at, segment)
                tq, tk, tv, ts = tile.backward(
                    g, gl, visit.query, k, v, o, s, additive, job.scale, keep, visit.fused, want_bias
                )
                total = tq if total is None else total + tq
                segment.add_to(visit.view_kv(dk), tk)
                segment.add_to(visit.view_kv(dv), tv)
                if dbias is not None and ts is not None:
                    visit.add_bias(dbias, segment, visit.unfold(ts))
            if total is not None:
                visit.view(dq)[:, :, rows] = visit.unfold(total).to(dq.dtype)
        dsink = None
        if sink is not None and ctx.needs_input_grad[4]:
            weight = (sink.to(wide)[:, None] - safe).exp()
            change = -(grad.to(wide) * out.to(wide)).sum(-1)
            if grad_lse is not None:
                change = change + grad_lse
            dsink = (weight * change).sum((0, 2)).to(sink.dtype)
        if dbias is not None:
            dbias = dbias.to(bias.dtype)
        return dq, dk.to(key.dtype), dv.to(value.dtype), dbias, dsink, None


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    lses = torch.stack([lse for _, lse in parts])
    total = lses.logsumexp(0)
    shares = (lses - total.masked_fill(total == -torch.inf, 0.0)).exp()
    out = sum(share[..., None] * part for share, (part, _) in zip(shares, parts, strict=True))
    return out.to(parts[0][0].dtype), total  # type: ignore[union-attr]


class _Visit:
    """One query block of one plan. Query heads that share a KV head are folded into the rows of the tile."""

    def __init__(
        self,
        plan: Plan,
        row: Row,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        job: Job,
        number: int,
    ) -> None:
        self.plan, self.row, self.job, self.number = plan, row, job, number
        self.repeats = job.repeats if plan.heads is None else 1
        self.key, self.value, self.bias = self.view_kv(key), self.view_kv(value), bias
        self.query = self.fold(self.view(query)[:, :, row.start : row.stop])
        self.fused = job.fused
        # The fused kernel wants masks in its own dtype; plain tiles compute in float32 at least.
        self.dtype = query.dtype if job.fused else torch.promote_types(query.dtype, torch.float32)

    def view(self, x: Tensor) -> Tensor:
        """The batch rows and query heads of the plan."""
        x = x if self.plan.batch is None else x[self.plan.batch[0] : self.plan.batch[0] + 1]
        return x if self.plan.heads is None else x[:, self.plan.heads[0] : self.plan.heads[0] + 1]

    def view_kv(self, x: Tensor) -> Tensor:
        x = x if self.plan.batch is None else x[self.plan.batch[0] : self.plan.batch[0] + 1]
        if self.plan.heads is None:
            return x
        head = self.plan.heads[0] // self.job.repeats
        return x[:, head : head + 1]

    def fold(self, x: Tensor) -> Tensor:
        """(b, hkv * r, n, ...) to (b, hkv, r * n, ...)."""
        r = self.repeats
        if r == 1:
            return x
        return x.reshape(x.shape[0], x.shape[1] // r, r * x.shape[2], *x.shape[3:])

    def unfold(self, x: Tensor) -> Tensor:
        r = self.repeats
        if r == 1:
            return x
        return x.reshape(x.shape[0], x.shape[1] * r, x.shape[2] // r, *x.shape[3:])

    def tiles(self) -> Iterator[tuple[Segment, Tensor, Tensor, Tensor | None]]:
        """(segment, key, value, additive) of each tile; long unmasked runs are cut where scores are held."""
        for segment in self._cut():
            yield segment, segment.take(self.key), segment.take(self.value), self._additive(segment)

    def _cut(self) -> Iterator[Segment]:
        whole = self.fused and self.bias is None and self.job.key_mask is None
        for segment in self.row.segments:
            if whole or segment.masked or len(segment.runs) > 1:
                yield segment
                continue
            (start, stop) = segment.runs[0]
            for at in range(start, stop, _PLAIN_COLUMNS):
                yield Segment(((at, min(at + _PLAIN_COLUMNS, stop)),), False)

    def _additive(self, segment: Segment) -> Tensor | None:
        dtype, device = self.dtype, self.query.device
        hidden = self.plan.hidden(self.row, segment, dtype, device)
        total = None if hidden is None else hidden.mask
        if self.job.key_mask is not None:
            seen = segment.take(self.view_mask(self.job.key_mask)[:, None, :, None])[:, :, None, :, 0]
            padding = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
            total = padding if total is None else total + padding
        if self.bias is not None:
            bias = self._take_bias(segment).to(dtype)
            total = bias if total is None else total + bias
        if total is None:
            return None
        rows = self.row.stop - self.row.start
        total = total.expand(-1, -1, rows, -1)
        if self.repeats > 1:
            if total.shape[1] == 1:
                total = total.repeat(1, 1, self.repeats, 1)
            else:
                total = self.fold(total)
        return total

    def blind(self, segment: Segment, additive: Tensor | None) -> Tensor | None:
        """The rows of a tile that see nothing; None if there is none."""
        if self.job.key_mask is not None or self.bias is not None or additive is None:
            return tile.blind_rows(additive)
        hidden = self.plan.hidden(self.row, segment, additive.dtype, additive.device)
        if hidden is None or hidden.blind is None:
            return None
        return hidden.blind.repeat(1, 1, self.repeats)

    def view_mask(self, mask: Tensor) -> Tensor:
        return mask if self.plan.batch is None else mask[self.plan.batch[0] : self.plan.batch[0] + 1]

    def _bias_view(self, bias: Tensor) -> Tensor:
        if self.plan.batch is not None and bias.shape[0] > 1:
            bias = bias[self.plan.batch[0] : self.plan.batch[0] + 1]
        if self.plan.heads is not None and bias.shape[1] > 1:
            bias = bias[:, self.plan.heads[0] : self.plan.heads[0] + 1]
        return bias if bias.shape[2] == 1 else bias[:, :, self.row.start : self.row.stop]

    def _take_bias(self, segment: Segment) -> Tensor:
        assert self.bias is not None
        bias = self._bias_view(self.bias)
        width = sum(stop - start for start, stop in segment.runs)
        if bias.shape[3] == 1:
            return bias.expand(-1, -1, -1, width)
        return torch.cat([bias[..., start:stop] for start, stop in segment.runs], dim=-1)

    def add_bias(self, dbias: Tensor, segment: Segment, dscores: Tensor) -> None:
        """dbias[tile] += dscores, summed over the axes along which the bias is broadcast."""
        view = self._bias_view(dbias)
        for axis in range(3):
            if view.shape[axis] == 1:
                dscores = dscores.sum(axis, keepdim=True)
        if view.shape[3] == 1:
            view += dscores.sum(3, keepdim=True)
            return
        at = 0
        for start, stop in segment.runs:
            view[..., start:stop] += dscores[..., at : at + stop - start]
            at += stop - start

    def keep(self, at: int, segment: Segment) -> Tensor | None:
        """Dropout factors of a tile, the same in forward and backward."""
        if self.job.dropout_p == 0.0:
            return None
        generator = torch.Generator(self.query.device).manual_seed(self.job.seed + 4099 * self.number + at)
        width = sum(stop - start for start, stop in segment.runs)
        draw = torch.rand(*self.query.shape[:3], width, generator=generator, device=self.query.device)
        return (draw >= self.job.dropout_p).to(draw.dtype) / (1.0 - self.job.dropout_p)


def _visits(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, job: Job) -> Iterator[_Visit]:
    number = 0
    for plan in job.plans:
        for row in plan.rows:
            yield _Visit(plan, row, query, key, value, bias, job, number)
            number += 1
