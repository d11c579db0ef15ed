"""What Triton's compiler says to every launch of the linear recurrences, without a GPU: `python -m` this.

The interpreter runs kernels as Python, and accepts what the compiler does not: products of two types, or
constants that change. Here calls run as usual, but a launch only has its kernel read by the compiler's
front end, with the types of the tensors it was given. Nothing is computed.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from heedful.ops.backends.triton import delta, linear, scan

NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TARGET = GPUTarget("cuda", 90, 32)
known: set[tuple[str, str, str]] = set()


def read(
    kernel: Any, choices: Any, parameters: dict[str, Any], programs: Any, *, like: Any, size: int
) -> None:
    """In place of `recurrences.start`."""
    config = choices[0]
    assert programs(config) > 0
    given = {**parameters, "ROWS": config.rows, "COLUMNS": config.columns}
    assert set(given) == set(kernel.arg_names)
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        # Triton makes constants of arguments that are 1.
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            types[parameter.name], constants[(i,)] = "constexpr", value
        else:
            types[parameter.name] = NAMES[value.dtype] if isinstance(value, Tensor) else "i32"
    key = (kernel.fn.__name__, str(types), str(constants))
    if key in known:
        return
    known.add(key)
    backend = make_backend(TARGET)
    options = backend.parse_options({"num_warps": config.warps, "num_stages": config.stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    source.make_ir(
        TARGET, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )


def back(out: tuple[Tensor, ...], leaves: list[Tensor | None]) -> None:
    torch.autograd.grad(sum(x.float().sum() for x in out), [x for x in leaves if x is not None])


def calls(dtype: torch.dtype, b: int, h: int, n: int) -> None:
    def leaf(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size, dtype=dtype, requires_grad=True)

    tokens = [leaf(b, h, n, width, dtype=dtype) for width in (24, 24, 40)]
    state = leaf(b, h, 24, 40)
    for shape in ((h,), (b, h, n), (b, h, n, 24)):
        g = leaf(*shape)
        back(linear.linear_attention(*tokens, g, state, dtype), [*tokens, g, state])
    back(linear.linear_attention(*tokens, g.detach(), state, dtype), tokens)
    rates = [leaf(b, h, n), leaf(b, h, n)]
    back(delta.gated_delta_rule(*tokens, *rates, state, dtype), [*tokens, *rates, state])
    for every in (True, False):
        u, steps, gate = (leaf(b, 6, n, dtype=dtype) for _ in range(3))
        B, C = leaf(b, h, 12, n, dtype=dtype), leaf(b, h, 12, n, dtype=dtype)
        extra = [leaf(6), gate, leaf(6)] if every else [None] * 3
        leaves = [u, steps, leaf(6, 12), B, C, *extra, leaf(b, 6, 12)]
        back(scan.selective_scan(*leaves, softplus=every), leaves)


def main() -> None:
    assert not triton.knobs.runtime.interpret
    for module in (linear, delta, scan):
        module.start = read
    for dtype in NAMES:
        calls(dtype, 2, 2, 130)
    calls(torch.bfloat16, 1, 1, 1)
    print(len(known), "launches")


if __name__ == "__main__":
    sys.exit(main())
