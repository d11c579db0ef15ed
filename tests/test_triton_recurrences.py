"""form="kernel" of the linear recurrences against their recurrent form in float64, values and all gradients.

Kernels run on the GPU where there is one, else in Triton's interpreter, which shows what they compute, not
how fast.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from heedful.ops.delta import gated_delta_rule, l2_normalize
from heedful.ops.linear import linear_attention
from heedful.ops.scan import selective_scan

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (it comes with PyTorch for CUDA, or alone)", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from heedful.ops.backends.triton import linear as linear_in_triton
from heedful.ops.backends.triton import scan as scan_in_triton
from heedful.ops.backends.triton.configs import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA GPU here")

DECAYS = (None, "head", "token", "channel")
HALVES = {"query", "key", "value", "u", "delta", "B", "C", "z"}
# Errors are those of rounding inputs, factors of products and outputs, added up.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
EXTREMES = (0.0, -1e4, -math.inf, -1e-6, -2.0)
Inputs = dict[str, Tensor]


def made(given: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Inputs:
    """Leaves on the device; what is not the width of a half stays float32."""
    return {
        name: x.to(DEVICE, dtype if name in HALVES else torch.float32).requires_grad_()
        for name, x in given.items()
    }


def linear_inputs(n, decay, *, b=1, h=2, d=5, e=4, dtype=torch.float32, features=False) -> Inputs:
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(b, h, n, width, generator=g) for width in (d, d, e))
    S = torch.randn(b, h, d, e + features, generator=g)
    if features:
        q, k, S = q.abs(), k.abs(), S.abs()
    given = {"query": q, "key": k, "value": v, "state": S}
    if decay:
        shape = {"head": (h,), "token": (b, h, n), "channel": (b, h, n, d)}[decay]
        given["log_decay"] = -torch.randn(shape, generator=g).abs() / 3
    return made(given, dtype)


def delta_inputs(n, *, b=1, h=2, d=5, e=4, dtype=torch.float32) -> Inputs:
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(b, h, n, width, generator=g) for width in (d, d, e))
    beta, decay = torch.randn(2, b, h, n, generator=g)
    given = {"query": q, "key": l2_normalize(k), "value": v, "beta": beta.sigmoid()}
    given |= {"log_decay": -decay.abs() / 3, "state": torch.randn(b, h, d, e, generator=g)}
    return made(given, dtype)


def scan_inputs(n, *, b=1, d=6, s=3, g=2, dtype=torch.float32) -> Inputs:
    r = torch.Generator().manual_seed(n)
    u, delta, z = torch.randn(3, b, d, n, generator=r)
    B, C = torch.randn(2, b, g, s, n, generator=r)
    D, bias = torch.randn(2, d, generator=r)
    given = {"u": u, "delta": delta - 1, "z": z, "B": B, "C": C, "D": D, "delta_bias": bias}
    given |= {"A": -torch.randn(d, s, generator=r).exp(), "state": torch.randn(b, d, s, generator=r)}
    return made(given, dtype)


@contextlib.contextmanager
def short_chunks(chunk: int = 8):
    """The interpreter scans number by number: small tiles keep it from taking minutes."""
    if DEVICE == "cuda":
        yield
        return
    tiles = {"join": [Config(2, 2, 4, 1)]}
    with patch.object(scan_in_triton, "CHUNK", chunk), patch.dict(scan_in_triton._TILES, tiles):
        yield


def results(op, inputs: Inputs, **options) -> list[Tensor]:
    """Output, last state, and the gradients of a fixed random projection of both."""
    found = op(**inputs, return_state=True, **options)
    g = torch.Generator().manual_seed(7)
    total = sum((x.double() * torch.randn(x.shape, generator=g).to(x.device)).sum() for x in found)
    return [*found, *torch.autograd.grad(total, list(inputs.values()))]


def agree(op, inputs: Inputs, tolerance: float | None = None, **options) -> None:
    if tolerance is None:
        tolerance = TOLERANCES[(inputs.get("query", inputs.get("u"))).dtype]
    got = results(op, inputs, form="kernel", **options)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    want = results(op, exact, form="recurrent", **options)
    for name, a, b in zip(("out", "last", *inputs), got, want, strict=True):
        assert a.isfinite().all(), name
        assert a.shape == b.shape and (name in ("out", "last") or a.dtype == inputs[name].dtype)
        assert ((a - b).abs() <= tolerance * b.abs().max()).all(), name
    assert got[0].dtype == next(iter(inputs.values())).dtype and got[1].dtype == torch.float32


@pytest.mark.parametrize("n", [1, 64, 70])
@pytest.mark.parametrize("decay", DECAYS)
def test_linear_attention(decay, n):
    agree(linear_attention, linear_inputs(n, decay))


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_linear_attention_of_batches_and_wide_heads(decay):
    """Several tiles of channels and of values, none of them full."""
    agree(linear_attention, linear_inputs(20, decay, b=2, h=2, d=40, e=24))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_attention_in_half_precision(dtype, decay):
    agree(linear_attention, linear_inputs(70, decay, h=1, d=24, e=16, dtype=dtype))


@pytest.mark.parametrize("decay", [None, "token"])
def test_normalised_linear_attention(decay):
    agree(linear_attention, linear_inputs(70, decay, features=True), normalize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_linear_attention_with_extreme_decays(decay, dtype):
    inputs = linear_inputs(140, decay, h=5 if decay == "head" else 1, dtype=dtype)
    shape = inputs["log_decay"].shape
    pick = torch.randint(5, shape, generator=torch.Generator().manual_seed(0))
    if decay == "head":
        pick = torch.arange(5)
    inputs["log_decay"] = torch.tensor(EXTREMES)[pick].to(DEVICE).requires_grad_()
    agree(linear_attention, inputs)


@pytest.mark.parametrize("n", [1, 64, 70])
def test_gated_delta_rule(n):
    agree(gated_delta_rule, delta_inputs(n))


def test_gated_delta_rule_of_batches_and_wide_heads():
    agree(gated_delta_rule, delta_inputs(20, b=2, h=2, d=40, e=72))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gated_delta_rule_in_half_precision(dtype):
    agree(gated_delta_rule, delta_inputs(70, h=1, d=24, e=16, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_delta_rule_with_extreme_decays(dtype):
    inputs = delta_inputs(140, h=1, dtype=dtype)
    pick = torch.randint(5, (1, 1, 140), generator=torch.Generator().manual_seed(0))
    inputs["log_decay"] = torch.tensor(EXTREMES)[pick].to(DEVICE).requires_grad_()
    agree(gated_delta_rule, inputs)


def test_a_key_that_comes_again_and_again_is_solved_for():
    """(1 + A)^-1 is then 1 minus a shift, while powers of A grow beyond 1e17."""
    inputs = delta_inputs(64)
    with torch.no_grad():
        inputs["key"][:] = inputs["key"][:, :, :1].clone()
        inputs["beta"].fill_(1.0)
        inputs["log_decay"].zero_()
    agree(gated_delta_rule, inputs)


@pytest.mark.parametrize("n", [1, 8, 29])
def test_selective_scan(n):
    with short_chunks():
        agree(selective_scan, scan_inputs(n), delta_softplus=True)


def test_selective_scan_of_batches_and_many_numbers():
    with short_chunks():
        agree(selective_scan, scan_inputs(9, b=2, d=3, s=16, g=1), delta_softplus=True)


@pytest.mark.parametrize("left_out", [("D",), ("z", "delta_bias", "state")])
def test_selective_scan_without(left_out):
    inputs = scan_inputs(13)
    inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()
    for name in left_out:
        del inputs[name]
    with short_chunks():
        agree(selective_scan, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_selective_scan_in_half_precision(dtype):
    with short_chunks():
        agree(selective_scan, scan_inputs(13, g=1, dtype=dtype), delta_softplus=True)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_selective_scan_with_extreme_steps():
    inputs = scan_inputs(30, d=2, s=4, g=1)
    extremes = torch.tensor([-90.0, -14.0, 0.0, 5.0, 1e4])  # softplus: 0, 1e-6, 0.7, 5, 1e4
    pick = torch.randint(5, inputs["delta"].shape, generator=torch.Generator().manual_seed(0))
    inputs["delta"] = extremes[pick].to(DEVICE).requires_grad_()
    inputs["A"] = torch.tensor([[0.0, -1e-6, -1.0, -1e6]]).repeat(2, 1).to(DEVICE).requires_grad_()
    with short_chunks():
        agree(selective_scan, inputs, delta_softplus=True)


CALLS = {
    "linear": (linear_attention, lambda n: linear_inputs(n, "channel")),
    "delta": (gated_delta_rule, delta_inputs),
    "scan": (selective_scan, scan_inputs),
}
TOKENS_LAST = {"u", "delta", "z", "B", "C"}
WHOLE = {"A", "D", "delta_bias", "state"}


@pytest.mark.parametrize("name", CALLS)
def test_two_calls_equal_one(name):
    op, draw = CALLS[name]
    with short_chunks(), torch.no_grad():
        inputs = draw(30)
        if name == "scan":
            inputs["delta"].abs_()
        out, last = op(**inputs, form="kernel", return_state=True)
        axis = -1 if name == "scan" else 2
        parts, state = [], inputs.pop("state")
        for cut in (slice(0, 13), slice(13, 30)):
            piece = {
                key: x if key in WHOLE else x[..., cut] if name == "scan" else x[:, :, cut]
                for key, x in inputs.items()
            }
            part, state = op(**piece, state=state, form="kernel", return_state=True)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, axis), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_views_are_read_in_place(name):
    op, draw = CALLS[name]
    inputs = draw(20)
    axes = (-1, -2) if name == "scan" else (1, 2)
    views = {
        key: x if key in WHOLE else x.detach().transpose(*axes).contiguous().transpose(*axes).requires_grad_()
        for key, x in inputs.items()
    }
    with short_chunks():
        agree(op, views, **({"delta_softplus": True} if name == "scan" else {}))


@pytest.mark.parametrize("name", CALLS)
def test_double_backward_says_that_it_does_not(name):
    op, draw = CALLS[name]
    inputs = draw(5)
    inputs |= {"delta": inputs["delta"].detach().abs()} if name == "scan" else {}
    first = next(iter(inputs.values()))
    with short_chunks():
        (grad,) = torch.autograd.grad(op(**inputs, form="kernel").sum(), [first], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_no_tokens(name):
    op, draw = CALLS[name]
    inputs = draw(0)
    out, last = op(**inputs, form="kernel", return_state=True)
    assert out.numel() == 0
    torch.testing.assert_close(last, inputs["state"])


@pytest.mark.door
@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_served_says_why(name):
    op, draw = CALLS[name]
    with pytest.raises(ValueError, match=r"has dtype torch\.float64, must be float16"):
        op(**{key: x.double() for key, x in draw(5).items()}, form="kernel")


@pytest.mark.door
def test_too_wide_says_so():
    with pytest.raises(ValueError, match="query has width 257, must be at most 256"):
        gated_delta_rule(**delta_inputs(5, d=257), form="kernel")
    with pytest.raises(ValueError, match="s must be at most 256"):
        selective_scan(**scan_inputs(5, s=257), form="kernel")


def test_only_what_a_pass_needs_is_kept():
    """Linear attention keeps its inputs alone for the backward pass; states are computed again."""
    inputs = linear_inputs(300, "token")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_attention(**inputs, form="kernel")
    assert sum(x.numel() for x in kept) == sum(x.numel() for x in inputs.values())
    assert linear_in_triton.CHUNK == 64


def test_the_compiler_reads_every_launch():
    """The interpreter accepts more than the compiler does; its front end needs no GPU."""
    command = [sys.executable, "-m", "tests.triton_front_end"]
    root = Path(__file__).parent.parent
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(root / "src")}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[0]) > 90


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_the_gpu(dtype, width):
    """All kernels as compiled, at lengths of many chunks, all decays."""
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 2e-5}[dtype]
    for decay in DECAYS:
        inputs = linear_inputs(1000, decay, b=2, h=2, d=width, e=width, dtype=dtype)
        agree(linear_attention, inputs, tolerance)
    agree(gated_delta_rule, delta_inputs(1000, b=2, d=width, e=2 * width, dtype=dtype), tolerance)
    inputs = scan_inputs(1000, b=2, d=96, s=16, g=2, dtype=dtype)
    agree(selective_scan, inputs, tolerance, delta_softplus=True)
