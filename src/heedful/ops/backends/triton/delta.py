"""The gated delta rule in Triton, forward and backward; what is written is read as in linear attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import Function

from heedful.ops.backends.triton.configs import Config
from heedful.ops.backends.triton.delta_kernels import solve, solve_gradient, write, write_back
from heedful.ops.backends.triton.linear import CHUNK, Chunks, work_of
from heedful.ops.backends.triton.recurrences import ONCE, even_rows, padded, start, strides
from heedful.ops.once import differentiable_once

WIDEST = 256  # channels of a key: a program of `write` holds all of them

# Rows (channels of keys) and columns (of values) of a tile, warps, stages; by kernel and bytes of a factor.
_TILES = {
    ("solve", 2): [Config(64, 64, 4, 2), Config(64, 64, 8, 2), Config(32, 32, 4, 2)],
    ("solve", 4): [Config(32, 32, 4, 2), Config(32, 32, 4, 1)],
    ("write", 2): [Config(16, 32, 4, 2), Config(16, 64, 4, 2), Config(16, 64, 8, 2), Config(16, 16, 4, 2)],
    ("write", 4): [Config(16, 32, 4, 1), Config(16, 16, 4, 1)],
    ("write_back", 2): [Config(16, 32, 4, 2), Config(16, 64, 8, 2), Config(16, 16, 4, 2)],
    ("write_back", 4): [Config(16, 32, 4, 1), Config(16, 16, 4, 1)],
    ("solve_gradient", 2): [Config(64, 64, 4, 2), Config(64, 64, 8, 2), Config(64, 32, 4, 2)],
    ("solve_gradient", 4): [Config(32, 32, 4, 2), Config(32, 32, 8, 1), Config(32, 16, 4, 1)],
}
_LEAST = 32  # the fewest channels a program of `solve_gradient` has


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(out in `dtype`, state) as heedful.ops.delta defines them; beta, log_decay and state float32."""
    wide = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    return _Delta.apply(query.to(wide), key.to(wide), value.to(wide), beta, log_decay, state, dtype)


class _Delta(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        beta: Tensor,
        decay: Tensor,
        state: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (even_rows(x) for x in (query, key, value))
        beta, state = beta.contiguous(), state.contiguous()
        rule = _Rule(Chunks(query, key, decay, value.shape[-1]), value, beta)
        _, writes, _, kept, last = rule.writes(state)
        ctx.save_for_backward(query, key, value, beta, decay, state)
        return rule.chunks.mix(writes, kept, dtype, back=False), last

    @staticmethod
    @differentiable_once(ONCE.format("gated_delta_rule"))
    def backward(ctx: Any, grad: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, beta, decay, state = ctx.saved_tensors
        grad = even_rows(grad)
        chunks = Chunks(query, key, decay, value.shape[-1])
        rule = _Rule(chunks, value, beta)
        inverse, writes, erased, before, _ = rule.writes(state)
        dread = chunks.mix(grad, None, writes.dtype, back=True)
        dwrites, after, dstate = rule.write_back(dread, erased, grad, dlast.contiguous())
        dquery, dkey, ddecay = chunks.gradients(writes, grad, before, after, torch.float32, decay=True)
        assert ddecay is not None
        dkey, dvalue, dbeta, ddecay_written = rule.solve_gradient(inverse, writes, dwrites, before, dkey)
        return dquery.to(query.dtype), dkey, dvalue, dbeta, ddecay + ddecay_written, dstate, None


class _Rule:
    """The kernels that writing needs, by what they take and give."""

    def __init__(self, chunks: Chunks, value: Tensor, beta: Tensor) -> None:
        self.chunks, self.value, self.beta = chunks, value, beta
        self.work = work_of(chunks.query)[0]
        self.d, self.e = chunks.query.shape[-1], chunks.width

    def start(self, kernel: Any, parameters: dict[str, Any], programs: Any) -> None:
        rows, columns = padded(self.d), padded(self.e)
        b, h, n, _ = self.chunks.query.shape
        cut = [
            replace(c, rows=min(c.rows, rows), columns=min(c.columns, columns))
            for c in _TILES[kernel.fn.__name__, self.work.itemsize]
        ]
        known = self.chunks.shared()
        del known["KIND"]
        start(
            kernel,
            list(dict.fromkeys(cut)),
            known | parameters,
            programs,
            like=self.value,
            size=b * h * n * self.d * self.e,
        )

    def writes(self, first: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(T of each chunk, u, erased, the states before all chunks and after the last)."""
        key, value, count = self.chunks.key, self.value, self.chunks.count
        b, h, n, d = key.shape
        new = first.new_empty
        inverse = new(b, h, count, CHUNK, CHUNK, dtype=self.work)
        fresh, erased = new(b, h, n, self.e, dtype=self.work), new(b, h, n, d, dtype=self.work)
        own: dict[str, Any]
        own = {"key": key, "value": value, "beta": self.beta, **strides("k", key), **strides("v", value)}
        own |= {"inverse": inverse, "fresh": fresh, "erased": erased, "LEVELS": CHUNK.bit_length() - 1}
        self.start(solve, own, lambda config: b * h * count)

        kept, last = new(b, h, count, d, self.e, dtype=self.work), torch.empty_like(first)
        writes = torch.empty_like(fresh)
        own = {"key": key, "fresh": fresh, "erased": erased, **strides("k", key), "PAD_D": padded(d)}
        own |= {"first": first, "kept": kept, "last": last, "writes": writes}
        self.start(write, own, lambda config: b * h * triton.cdiv(self.e, config.columns))
        return inverse, writes, erased, kept, last

    def write_back(
        self, dread: Tensor, erased: Tensor, grad: Tensor, dlast: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of u, of the states after all chunks and of the one before the first."""
        query, key = self.chunks.query, self.chunks.key
        b, h, _, d = query.shape
        kept = dlast.new_empty(b, h, self.chunks.count, d, self.e, dtype=self.work)
        dfirst, dwrites = torch.empty_like(dlast), torch.empty_like(dread)
        own: dict[str, Any]
        own = {"query": query, "key": key, "erased": erased, "grad": grad, "dread": dread, "dwrites": dwrites}
        own |= {"first": dlast, "kept": kept, "last": dfirst, "PAD_D": padded(d)}
        own |= strides("q", query) | strides("k", key) | strides("o", grad)
        self.start(write_back, own, lambda config: b * h * triton.cdiv(self.e, config.columns))
        return dwrites, kept, dfirst

    def solve_gradient(
        self, inverse: Tensor, writes: Tensor, dwrites: Tensor, before: Tensor, dkey_read: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of key, value, beta, and log_decay as far as it decides what is written."""
        key, value = self.chunks.key, self.value
        b, h, n, d = key.shape
        dkey, dvalue = (x.new_empty(x.shape) for x in (key, value))
        # Programs of few, wide tiles leave the last shares as they are.
        dbeta, ddecay = inverse.new_zeros(2, triton.cdiv(d, _LEAST), b, h, n, dtype=torch.float32)
        own = {
            "key": key,
            "value": value,
            "beta": self.beta,
            "inverse": inverse,
            "writes": writes,
            "dwrites": dwrites,
            "before": before,
            "dkey_read": dkey_read,
            "dkey": dkey,
            "dvalue": dvalue,
            "dbeta": dbeta,
            "ddecay": ddecay,
            "planes": b * h,
            **strides("k", key),
            **strides("v", value),
        }
        self.start(
            solve_gradient, own, lambda config: b * h * self.chunks.count * triton.cdiv(d, config.rows)
        )
        return dkey, dvalue, dbeta.sum(0), ddecay.sum(0)
