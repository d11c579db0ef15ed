"""Linear recurrences on a CUDA GPU: heedful's Triton kernels beside those of other packages.

The other is flash-linear-attention (`fla`), for the selective scan `mamba_ssm`, where it is installed, and
heedful's own chunked form where it is not. Started by scripts/gpu_check.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_measure import difference, pair, times
from torch import Tensor

from heedful.ops.backends.triton import configs
from heedful.ops.delta import gated_delta_rule, l2_normalize
from heedful.ops.linear import decay_slopes, linear_attention
from heedful.ops.scan import selective_scan

Ways = tuple[Callable[[], Tensor], Callable[[], Tensor] | None, Callable[[], Tensor]]
# Batch rows, tokens, heads, width. Of the scan, heads x width are its channels, with 16 numbers each.
SIZES = [(4, 8192, 16, 64), (4, 8192, 16, 128), (1, 32768, 16, 128), (2, 16384, 64, 64), (1, 65536, 32, 128)]
AGREE = 0.03  # largest difference in norm: bfloat16 factors, in the delta rule several after each other


def _other(module: str, name: str) -> Any:
    """A function of another package, or None where that is not installed or has no such function."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return None
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        print(f"{module}.{name}: {error}", flush=True)
        return None


def _heads(b: int, n: int, h: int, d: int) -> Tensor:
    """(b, h, n, d) as a view of (b, n, h, d): how layers give them, and the order of `fla`."""
    return torch.randn(b, n, h, d, device="cuda", dtype=torch.bfloat16).requires_grad_()


def _linear(kind: str, b: int, n: int, h: int, d: int) -> tuple[tuple[Tensor, ...], Ways]:
    q, k, v = (_heads(b, n, h, d) for _ in range(3))
    leaves: tuple[Tensor, ...] = (q, k, v)
    g, given = None, {}
    if kind == "head":
        g = -decay_slopes(h).float().cuda()
        name, given = "chunk_simple_gla", {"g_gamma": g}
    elif kind == "token":
        g = F.logsigmoid(torch.randn(b, n, h, device="cuda")).requires_grad_()
        name, given = "chunk_simple_gla", {"g": g}
    else:
        g = (F.logsigmoid(torch.randn(b, n, h, d, device="cuda")) / 16).requires_grad_()
        name, given = "chunk_gla", {"g": g}
    if kind != "head":
        leaves = (*leaves, g)
    fla = _other("fla.ops.gla" if kind == "channel" else "fla.ops.simple_gla", name)

    def ours(form: str) -> Tensor:
        decay = g if kind == "head" else g.transpose(1, 2)
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return linear_attention(*turned, decay, form=form).transpose(1, 2)

    def theirs() -> Tensor:
        return fla(q, k, v, scale=1.0, **given)[0]

    return leaves, (lambda: ours("kernel"), theirs if fla else None, lambda: ours("chunked"))


def _delta(b: int, n: int, h: int, d: int) -> tuple[tuple[Tensor, ...], Ways]:
    q, k, v = (_heads(b, n, h, d) for _ in range(3))
    k = l2_normalize(k.detach()).requires_grad_()
    beta = torch.rand(b, n, h, device="cuda").requires_grad_()
    g = F.logsigmoid(torch.randn(b, n, h, device="cuda") + 3).requires_grad_()
    fla = _other("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")

    def ours(form: str) -> Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v, beta, g))
        return gated_delta_rule(*turned, form=form).transpose(1, 2)

    def theirs() -> Tensor:
        return fla(q=q, k=k, v=v, g=g, beta=beta, scale=1.0)[0]

    return (q, k, v, beta, g), (lambda: ours("kernel"), theirs if fla else None, lambda: ours("chunked"))


def _scan(b: int, n: int, h: int, d: int) -> tuple[tuple[Tensor, ...], Ways]:
    def half(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16).requires_grad_()

    channels, s = h * d, 16
    u, delta, z = (half(b, channels, n) for _ in range(3))
    B, C = half(b, s, n), half(b, s, n)
    A = (-torch.arange(1.0, s + 1, device="cuda")).repeat(channels, 1).requires_grad_()
    D, bias = (torch.randn(channels, device="cuda").requires_grad_() for _ in range(2))
    mamba = _other("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")

    def ours(form: str) -> Tensor:
        return selective_scan(u, delta, A, B, C, D, z=z, delta_bias=bias - 4, delta_softplus=True, form=form)

    def theirs() -> Tensor:
        return mamba(u, delta, A, B, C, D, z, bias - 4, True)

    leaves = (u, delta, A, B, C, D, z, bias)
    return leaves, (lambda: ours("kernel"), theirs if mamba else None, lambda: ours("chunked"))


OPS: dict[str, Callable[[int, int, int, int], tuple[tuple[Tensor, ...], Ways]]] = {
    "linear-head": lambda *size: _linear("head", *size),
    "linear-token": lambda *size: _linear("token", *size),
    "linear-channel": lambda *size: _linear("channel", *size),
    "delta": _delta,
    "scan": _scan,
}


def point(op: str, size: tuple[int, int, int, int]) -> dict[str, Any]:
    found: dict[str, Any] = {"op": op, "size": list(size)}
    try:
        return found | _measure(op, size)
    except (RuntimeError, ValueError, TypeError) as error:  # another op or size may still serve
        return found | {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
    finally:
        torch.cuda.empty_cache()


def _measure(op: str, size: tuple[int, int, int, int]) -> dict[str, Any]:
    torch.manual_seed(0)
    leaves, (kernel, other, chunked) = OPS[op](*size)
    grad = torch.randn_like(kernel())
    against = "chunked" if other is None else "mamba_ssm" if op == "scan" else "fla"
    # What is right is decided by heedful's own chunked form, which is tested against float64.
    result: dict[str, Any] = {"against": against, "difference": difference(kernel, chunked, leaves, grad)}
    if other is not None:
        result["difference_other"] = difference(other, chunked, leaves, grad)
    result["triton"] = times(kernel, leaves, grad)
    result["other"] = times(other or chunked, leaves, grad)
    result["over_other"] = [a / b for a, b in zip(result["other"], result["triton"], strict=True)]
    result["configs"] = {
        f"{key[0]}": [c.rows, c.columns, c.warps, c.stages] for key, c in configs.measured.items()
    }
    configs.measured.clear()
    return result


def wrong(x: dict[str, Any]) -> bool:
    return "error" in x or x["difference"] > AGREE


HEAD = (
    f"{'recurrence':<15}{'b':>3}{'tokens':>7}{'heads':>6}{'D':>5}{'triton ms':>19}{'other ms':>19}"
    f"{'ratio':>12}{'difference':>12}  other"
)


def line(x: dict[str, Any]) -> str:
    b, n, h, d = x["size"]
    head = f"{x['op']:<15}{b:>3}{n:>7}{h:>6}{d:>5}"
    if "error" in x:
        return f"{head}  {x['error']}"
    goal = "" if min(x["over_other"]) >= 1 else "  below goal"
    return (
        f"{head}{pair(x['triton'], 3):>19}{pair(x['other'], 3):>19}{pair(x['over_other'], 2):>12}"
        f"{x['difference']:>12.4f}  {x['against']}{goal}"
    )


def table(points: list[dict[str, Any]]) -> str:
    return "\n".join(["", "recurrences: forward, forward + backward; bfloat16", HEAD, *map(line, points)])
