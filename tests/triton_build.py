"""Every launch of the Triton kernels, compiled to machine code without a GPU: `python -m tests.triton_build`.

Triton brings NVIDIA's assembler, so that all but the running can be seen on any machine: whether a kernel
compiles, the registers of a thread, the bytes that did not fit into them (`stack`), the shared memory of a
program. Calls run as usual, but a launch only compiles its kernel. Nothing is computed.

    python -m tests.triton_build --widths 64,128 --dtypes bfloat16,float32 --capability 90 --all
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from heedful import patterns as p
from heedful.ops.backends.triton import delta, launch, linear, recurrences, scan
from heedful.ops.call import Call

run = importlib.import_module("heedful.ops.backends.triton.run")
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_compile = jit.JITFunction.run
seen: set[tuple[str, str]] = set()
rows: list[dict[str, Any]] = []


class Device:
    """What Triton asks a GPU before it compiles for it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    """In place of a launch."""
    kernel = _compile(self, *args, grid=grid, warmup=True, **options)
    if (self.fn.__name__, kernel.hash) not in seen:
        seen.add((self.fn.__name__, kernel.hash))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            said = subprocess.run(
                [_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
            )
        found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
        assert found is not None
        rows.append(
            {
                "kernel": self.fn.__name__,
                "tile": f"{options.get('ROWS', '')}x{options.get('COLUMNS', '')}",
                "warps": options.get("num_warps", 4),
                "stages": options.get("num_stages", ""),
                "registers": int(found[1]),
                "stack": int(found[2]),
                "shared": kernel.metadata.shared,
                "tensor cores": "wgmma" in kernel.asm["ptx"] or "mma.sync" in kernel.asm["ptx"],
            }
        )
        print(*(f"{value!s:>14}" for value in rows[-1].values()), flush=True)
    return kernel


def leaf(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(size, dtype=dtype, requires_grad=True)


def back(out: tuple[Tensor, ...], leaves: list[Tensor]) -> None:
    torch.autograd.grad(sum(x.float().sum() for x in out), leaves)


def attention(dtype: torch.dtype, width: int) -> None:
    """Masks by position and by packed bits; with a key mask and a sink; blocks of 128 and of 32."""
    band = p.Causal() & p.Window(256)
    bits = p.Causal() & p.Window(256, dilation=2)
    for pattern, hidden in ((band, False), (bits, True), (p.Neighborhood((32, 32), (7, 7)), False)):
        q, k, v = (leaf(1, 2, 1024, width, dtype=dtype) for _ in range(3))
        seen = torch.ones(1, 1024, dtype=torch.bool) if hidden else None
        sink = leaf(2) if hidden else None
        call = Call(q, k, v, pattern, None, width**-0.5, seen, sink, 0, 0.0, True)
        back(run.run(call), [q, k, v] + ([sink] if sink is not None else []))


def recurrence(dtype: torch.dtype, width: int) -> None:
    b, h, n = 2, 2, 256
    tokens = [leaf(b, h, n, width, dtype=dtype) for _ in range(3)]
    state = leaf(b, h, width, width)
    for shape in ((h,), (b, h, n), (b, h, n, width)):
        g = leaf(*shape)
        back(linear.linear_attention(*tokens, g, state, dtype), [*tokens, g, state])
    rates = [leaf(b, h, n), leaf(b, h, n)]
    back(delta.gated_delta_rule(*tokens, *rates, state, dtype), [*tokens, *rates, state])
    u, steps, gate = (leaf(b, 96, n, dtype=dtype) for _ in range(3))
    B, C = leaf(b, 1, 16, n, dtype=dtype), leaf(b, 1, 16, n, dtype=dtype)
    leaves = [u, steps, leaf(96, 16), B, C, leaf(96), gate, leaf(96), leaf(b, 96, 16)]
    back(scan.selective_scan(*leaves, softplus=True), leaves)


def choices(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", default="64", help="head widths")
    parser.add_argument("--dtypes", default="bfloat16", help="of bfloat16, float16, float32")
    parser.add_argument("--capability", type=int, default=90, help="90 is Hopper, 80 Ampere")
    parser.add_argument("--all", action="store_true", help="every candidate tile, not the first")
    return parser.parse_args(arguments)


def launched(every: bool) -> Any:
    def launch_best(kernel: Any, key: Any, options: list[Any], pairs: int, launch: Any) -> None:
        for option in options if every else options[:1]:
            launch(option)

    return launch_best


def combinations(asked: argparse.Namespace) -> Iterator[tuple[torch.dtype, int]]:
    for dtype in asked.dtypes.split(","):
        for width in asked.widths.split(","):
            yield getattr(torch, dtype), int(width)


def main() -> None:
    asked = choices()
    assert not triton.knobs.runtime.interpret
    driver.set_active(Device(asked.capability))
    jit.JITFunction.run = compile_alone
    launch.launch_best = recurrences.launch_best = launched(asked.all)
    for dtype, width in combinations(asked):
        print(f"\n{dtype}, width {width}, capability {asked.capability}", flush=True)
        names = ("kernel", "tile", "warps", "stages", "registers", "stack", "shared", "tensor cores")
        print(*(f"{name:>14}" for name in names), flush=True)
        attention(dtype, width)
        recurrence(dtype, width)
    print(len(rows), "kernels")


if __name__ == "__main__":
    sys.exit(main())
