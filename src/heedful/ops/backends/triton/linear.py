"""Linear attention in Triton, forward and backward: one state a chunk is kept, and only while a pass runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from heedful.ops.backends.triton.chunks import CHANNEL, HEAD, TOKEN
from heedful.ops.backends.triton.configs import Config
from heedful.ops.backends.triton.linear_kernels import gradients, mix, states
from heedful.ops.backends.triton.recurrences import ONCE, even_rows, padded, start, strides
from heedful.ops.once import differentiable_once

CHUNK = 64  # tokens of a chunk, a power of two

# Rows (channels of keys) and columns (of values) of a tile, warps, stages; by kernel, bytes of a factor, and
# whether channels decay apart. The first serves where nothing is measured.
_TILES = {
    ("states", 2, False): [
        Config(64, 64, 4, 3),
        Config(32, 64, 4, 3),
        Config(32, 32, 2, 3),
        Config(128, 64, 8, 2),
    ],
    ("states", 2, True): [Config(64, 64, 8, 2), Config(32, 64, 4, 2), Config(32, 32, 4, 1)],
    ("states", 4, False): [Config(64, 64, 4, 1), Config(32, 64, 4, 2), Config(32, 32, 4, 2)],
    ("states", 4, True): [Config(64, 64, 4, 1), Config(32, 32, 4, 1)],
    ("mix", 2, False): [Config(64, 64, 4, 2), Config(64, 128, 8, 2), Config(128, 128, 8, 1)],
    ("mix", 2, True): [Config(32, 64, 8, 1), Config(32, 128, 8, 1), Config(64, 64, 8, 1)],
    ("mix", 4, False): [Config(32, 64, 4, 2), Config(64, 64, 8, 1), Config(32, 32, 4, 1)],
    ("mix", 4, True): [Config(32, 64, 8, 1), Config(16, 64, 4, 1)],
    ("gradients", 2, False): [
        Config(64, 64, 8, 2),
        Config(64, 64, 4, 2),
        Config(128, 32, 8, 2),
        Config(64, 32, 4, 2),
    ],
    ("gradients", 2, True): [Config(32, 64, 8, 1), Config(32, 32, 8, 1)],
    ("gradients", 4, False): [Config(32, 32, 4, 2), Config(32, 16, 4, 1)],
    ("gradients", 4, True): [Config(32, 32, 8, 1), Config(32, 16, 8, 1)],
}
_LEAST = 32  # the fewest channels a program of `gradients` has


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out in `dtype`, state) as heedful.ops.linear defines them; log_decay and state float32."""
    wide = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    return _Linear.apply(query.to(wide), key.to(wide), value.to(wide), log_decay, state, dtype)


def work_of(x: Tensor) -> tuple[torch.dtype, str]:
    """What products are computed with: the type of their factors, and the precision of float32 ones.

    Scores and states are not bounded, and float16 would overflow: float16 inputs are computed in TF32, which
    holds them exactly.
    """
    if x.dtype == torch.bfloat16:
        return torch.bfloat16, "tf32"
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return torch.float32, "tf32x3" if exact else "tf32"


@dataclass(frozen=True, eq=False)
class Chunks:
    """Queries, keys and decays of a call, cut into chunks; the kernels by what they take and give."""

    query: Tensor
    key: Tensor
    decay: Tensor
    width: int  # of the values

    @property
    def count(self) -> int:
        return -(-self.query.shape[2] // CHUNK)

    @property
    def kind(self) -> Any:
        return {1: HEAD, 3: TOKEN, 4: CHANNEL}[self.decay.ndim]

    def shared(self) -> dict[str, Any]:
        b, h, n, d = self.query.shape
        decay = self.decay
        if decay.ndim == 1:
            decay = decay[None, :, None].expand(b, -1, n)  # without strides to other rows and tokens
        work, precision = work_of(self.query)
        return {
            "decay": decay,
            **strides("g", decay),
            "heads": h,
            "n": n,
            "chunks": self.count,
            "D": d,
            "E": self.width,
            "C": CHUNK,
            "KIND": self.kind,
            "WORK": {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[work],
            "PRECISION": precision,
        }

    def start(self, kernel: Any, parameters: dict[str, Any], programs: Any) -> None:
        b, h, n, d = self.query.shape
        most = (padded(d), padded(self.width))
        cut = [
            replace(c, rows=min(c.rows, most[0]), columns=min(c.columns, most[1]))
            for c in _TILES[kernel.fn.__name__, work_of(self.query)[0].itemsize, self.decay.ndim == 4]
        ]
        start(
            kernel,
            list(dict.fromkeys(cut)),
            self.shared() | parameters,
            programs,
            like=self.query,
            size=b * h * n * d * self.width,
        )

    def states(self, key: Tensor, value: Tensor, first: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
        """The states before all chunks (b, h, chunks, d, e) and after the last; see the kernel."""
        b, h, _, d = self.query.shape
        e = self.width
        kept = first.new_empty(b, h, self.count, d, e, dtype=work_of(self.query)[0])
        last = torch.empty_like(first)
        own = {"key": key, "value": value, "first": first, "kept": kept, "last": last, "BACK": back}
        own |= strides("k", key) | strides("v", value)
        self.start(
            states, own, lambda config: b * h * triton.cdiv(d, config.rows) * triton.cdiv(e, config.columns)
        )
        return kept, last

    def mix(self, value: Tensor, kept: Tensor | None, dtype: torch.dtype, *, back: bool) -> Tensor:
        """What the queries read; with `back`, what the values get. kept=None: of their own chunk alone."""
        b, h, n, _ = self.query.shape
        out = value.new_empty(b, h, n, self.width, dtype=dtype)
        own = {
            "query": self.query,
            "key": self.key,
            "value": value,
            "kept": value if kept is None else kept,
            "out": out,
            **strides("q", self.query),
            **strides("k", self.key),
            **strides("v", value),
            "LEVELS": CHUNK.bit_length() - 1,
            "BACK": back,
            "INTER": kept is not None,
        }
        self.start(mix, own, lambda config: b * h * self.count * triton.cdiv(self.width, config.columns))
        return out

    def gradients(
        self, value: Tensor, grad: Tensor, before: Tensor, after: Tensor, dtype: torch.dtype, *, decay: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of query and key in `dtype`, and of log_decay if `decay` is set."""
        b, h, n, d = self.query.shape
        by_channel = self.decay.ndim == 4
        dquery, dkey = (grad.new_empty(b, h, n, d, dtype=dtype) for _ in range(2))
        # Programs of few, wide tiles leave the last shares as they are.
        size = (b, h, n, d) if by_channel else (triton.cdiv(d, _LEAST), b, h, n)
        found = grad.new_zeros(size if decay else (1,), dtype=torch.float32)
        own = {
            "query": self.query,
            "key": self.key,
            "value": value,
            "grad": grad,
            "before": before,
            "dafter": after,
            "dquery": dquery,
            "dkey": dkey,
            "ddecay": found,
            **strides("q", self.query),
            **strides("k", self.key),
            **strides("v", value),
            **strides("o", grad),
            "planes": b * h,
            "LEVELS": CHUNK.bit_length() - 1,
            "DECAY": decay,
        }
        self.start(gradients, own, lambda config: b * h * self.count * triton.cdiv(d, config.rows))
        if not decay:
            return dquery, dkey, None
        found = found if by_channel else found.sum(0)
        return dquery, dkey, found.sum((0, 2)) if self.decay.ndim == 1 else found


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, state: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (even_rows(x) for x in (query, key, value))
        decay, state = even_rows(decay), state.contiguous()
        ctx.save_for_backward(query, key, value, decay, state)
        chunks = Chunks(query, key, decay, value.shape[-1])
        kept, last = chunks.states(key, value, state, back=False)
        return chunks.mix(value, kept, dtype, back=False), last

    @staticmethod
    @differentiable_once(ONCE.format("linear_attention"))
    def backward(ctx: Any, grad: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, decay, state = ctx.saved_tensors
        grad = even_rows(grad)
        chunks = Chunks(query, key, decay, value.shape[-1])
        before, _ = chunks.states(key, value, state, back=False)
        after, dstate = chunks.states(query, grad, dlast.contiguous(), back=True)
        dvalue = chunks.mix(grad, after, value.dtype, back=True)
        dquery, dkey, ddecay = chunks.gradients(
            value, grad, before, after, query.dtype, decay=ctx.needs_input_grad[3]
        )
        return dquery, dkey, dvalue, ddecay, dstate, None
