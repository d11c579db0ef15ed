"""The selective scan in Triton, forward and backward: one state a chunk waits for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import Function

from heedful.ops.backends.triton.configs import Config
from heedful.ops.backends.triton.recurrences import ONCE, even_rows, start
from heedful.ops.backends.triton.scan_kernels import ends, gradients, join, outputs
from heedful.ops.once import differentiable_once

CHUNK = 64  # tokens of a chunk, a power of two
WIDEST = 256  # numbers of a channel
PROGRAMS = 2048  # from which on a GPU is busy

# Channels of a tile, chunks that `join` takes at once, warps, stages.
_TILES = {
    "ends": [Config(4, 1, 4, 1), Config(8, 1, 4, 1), Config(2, 1, 2, 1), Config(1, 1, 4, 1)],
    "join": [Config(8, 16, 4, 1), Config(1, 16, 4, 1)],
    "outputs": [Config(4, 1, 4, 1), Config(2, 1, 2, 1), Config(8, 1, 8, 1), Config(1, 1, 4, 1)],
    "gradients": [Config(2, 1, 4, 1), Config(4, 1, 8, 1), Config(1, 1, 4, 1)],
}


@dataclass(frozen=True)
class _Options:
    softplus: bool
    bias: bool
    skip: bool
    gate: bool


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    *,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """(y, state) as heedful.ops.scan defines them, B and C (b, g, s, n), state (b, d, s) in float32."""
    options = _Options(softplus, delta_bias is not None, D is not None, z is not None)
    return _Scan.apply(u, delta, A, B, C, D, z, delta_bias, state, options)


class _Scan(Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
        state: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        job = _Job(u, delta, A, B, C, D, z, bias, options)
        kept = job.borders(job.u, job.B, state, back=False)
        y = job.outputs(kept)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, kept)
        ctx.options = options
        return y, kept[:, -1].clone()

    @staticmethod
    @differentiable_once(ONCE.format("selective_scan"))
    def backward(ctx: Any, grad: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, bias, kept = ctx.saved_tensors
        job = _Job(u, delta, A, B, C, D, z, bias, ctx.options)
        grad = even_rows(grad)
        dkept = job.borders(grad, job.C, dlast, back=True)
        b, d, n = u.shape
        g, s, count = job.groups, job.s, job.count
        splits = min(triton.cdiv(job.width, 4), max(1, PROGRAMS // (b * g * count)))
        new = kept.new_empty
        du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
        dgate = du if z is None else z.new_empty(z.shape)
        drates, dskip = new(b, count, d, s), new(b, count, d)
        dB, dC = (new(splits, b, g, s, n) for _ in range(2))
        found = {"du": du, "ddelta": ddelta, "drates": drates, "dB": dB, "dC": dC}
        own = {"grad": grad, "kept": kept, "dkept": dkept, "dskip": dskip, "dgate": dgate, **found}
        own |= {**_strides("y", grad), "batch": b, "splits": splits}
        job.start(gradients, {**job.inputs(), **own}, lambda config: b * g * count * splits)
        dB, dC = dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
        dD = None if D is None else dskip.sum((0, 1)).to(D.dtype)
        dbias = None if bias is None else ddelta.sum((0, 2), dtype=torch.float32).to(bias.dtype)
        dA = drates.sum((0, 1)).to(A.dtype)
        return du, ddelta, dA, dB, dC, dD, None if z is None else dgate, dbias, dkept[:, 0].clone(), None


class _Job:
    """A call and its kernels."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
        options: _Options,
    ) -> None:
        self.u, self.delta = even_rows(u), even_rows(delta)
        self.A, self.B, self.C, self.options = A.contiguous(), B, C, options
        # Where there is nothing to pass, some tensor stands in; the kernels do not touch it.
        self.D = self.A if D is None else D.contiguous()
        self.bias = self.A if bias is None else bias.contiguous()
        self.z = self.u if z is None else even_rows(z)
        self.batch, self.dim, self.n = u.shape
        self.groups, self.s = B.shape[1:3]
        self.width = self.dim // self.groups
        self.count = triton.cdiv(self.n, CHUNK)

    def inputs(self) -> dict[str, Any]:
        """Parameters that `outputs` and `gradients` share."""
        return {
            **self._steps(),
            "u": self.u,
            "B": self.B,
            "C": self.C,
            "skip": self.D,
            **_strides("u", self.u),
            **_strides("b", self.B),
            **_strides("c", self.C),
            "SKIP": self.options.skip,
        }

    def _steps(self) -> dict[str, Any]:
        return {
            "delta": self.delta,
            "bias": self.bias,
            "rates": self.A,
            "gate": self.z,
            **_strides("d", self.delta),
            **_strides("z", self.z),
            "n": self.n,
            "dim": self.dim,
            "width": self.width,
            "groups": self.groups,
            "chunks": self.count,
            "T": CHUNK,
            **self._numbers(),
            "BIAS": self.options.bias,
            "SOFTPLUS": self.options.softplus,
            "GATE": self.options.gate,
        }

    def _numbers(self) -> dict[str, int]:
        return {"S": self.s, "PAD_S": 1 << (self.s - 1).bit_length()}

    def start(self, kernel: Any, parameters: dict[str, Any], programs: Callable[[Config], int]) -> None:
        size = self.batch * self.dim * self.n * self.s
        start(kernel, _TILES[kernel.fn.__name__], parameters, programs, like=self.u, size=size)

    def borders(self, x: Tensor, numbers: Tensor, state: Tensor, *, back: bool) -> Tensor:
        """The states at all borders of chunks from the first one; with `back` their gradients from the last.

        x, numbers: u and B; with `back` the gradients of y and C.
        """
        b, d, s, count = self.batch, self.dim, self.s, self.count
        new = state.new_empty
        added, totals, kept = new(b, count, d, s), new(b, count, d), new(b, count + 1, d, s)
        kept[:, -1 if back else 0] = state
        sums = {"added": added, "totals": totals, "BACK": back}
        own = {**self._steps(), **sums, "u": x, **_strides("u", x)}
        own |= {"numbers": numbers, **_strides("n", numbers)}
        self.start(ends, own, lambda config: b * self.groups * count * triton.cdiv(self.width, config.rows))
        own = {"rates": self.A, **sums, "kept": kept, "dim": d, "chunks": count, **self._numbers()}
        self.start(join, own, lambda config: b * triton.cdiv(d, config.rows))
        return kept

    def outputs(self, kept: Tensor) -> Tensor:
        y = self.u.new_empty(self.u.shape)
        programs = self.batch * self.groups * self.count
        own = {**self.inputs(), "kept": kept, "out": y}
        self.start(outputs, own, lambda config: programs * triton.cdiv(self.width, config.rows))
        return y


def _strides(name: str, x: Tensor) -> dict[str, int]:
    axes = "bd" if x.ndim == 3 else "bgsn"
    return {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate(axes)}
