"""Thousands of tokens with decays from none to all, mixed: finite, and close to float64, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.ops.delta import gated_delta_rule, l2_normalize
from heedful.ops.linear import linear_attention
from heedful.ops.scan import selective_scan

N = 2048
# Rounding of float32 sums; of bfloat16 outputs and of the gradients that come into them.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def mixed(*shape: int) -> Tensor:
    """Mostly slow decays, and now and then one that leaves little or nothing."""
    choices = torch.tensor([0.0, -1e-6, -1e-3, -2.0, -30.0, -1e4])
    odds = torch.tensor([0.3, 0.3, 0.28, 0.08, 0.02, 0.02])
    pick = torch.multinomial(odds, N * 64, True, generator=torch.Generator().manual_seed(1))
    return choices[pick][: torch.Size(shape).numel()].reshape(shape)


def linear_inputs(decay: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, N, 8, generator=g)
    value = torch.randn(1, 2, N, 4, generator=g)
    return {"query": q, "key": k, "value": value, "log_decay": mixed(*decay)}


def delta_inputs() -> dict[str, Tensor]:
    inputs = linear_inputs((1, 2, N))
    beta = torch.rand(1, 2, N, generator=torch.Generator().manual_seed(2))
    return inputs | {"key": l2_normalize(inputs["key"]), "beta": beta}


def scan_inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    u, z = torch.randn(2, 1, 4, N, generator=g)
    B, C = torch.randn(2, 1, 4, N, generator=g)
    A = -torch.tensor([[1e-6, 0.1, 1.0, 1e4]]).repeat(4, 1)
    return {"u": u, "delta": -mixed(1, 4, N).clamp(min=-5.0), "A": A, "B": B, "C": C, "z": z}


CASES = {
    "linear, token": (linear_attention, lambda: linear_inputs((1, 2, N))),
    "linear, channel": (linear_attention, lambda: linear_inputs((1, 2, N, 8))),
    "delta": (gated_delta_rule, delta_inputs),
    "scan": (selective_scan, scan_inputs),
}


def results(op, inputs: dict[str, Tensor]) -> list[Tensor]:
    found = op(**inputs, return_state=True)
    g = torch.Generator().manual_seed(7)
    total = sum((x.double() * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum() for x in found)
    return [*found, *torch.autograd.grad(total, list(inputs.values()))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_mixed_decays_stay_near_float64(name, dtype):
    op, draw = CASES[name]
    inputs = {key: x.to(dtype).requires_grad_() for key, x in draw().items()}
    exact = {key: x.detach().double().requires_grad_() for key, x in inputs.items()}
    for key, a, b in zip(("out", "last", *inputs), results(op, inputs), results(op, exact), strict=True):
        assert a.isfinite().all(), key
        assert ((a - b).abs() <= TOLERANCES[dtype] * b.abs().max()).all(), key


@pytest.mark.parametrize("op", [linear_attention, gated_delta_rule])
def test_very_slow_decays_do_not_add_up_to_an_error(op):
    """exp(-1e-7) is no float32: rounded chunk after chunk, 65536 tokens would be wrong by 1e-5."""
    n = 65536
    q, k, v = torch.rand(3, 1, 2, n, 2, generator=torch.Generator().manual_seed(0))
    decay = torch.tensor([-1e-7, -1e-6])
    rest = {"log_decay": decay}
    if op is gated_delta_rule:
        rest = {"beta": torch.full((1, 2, n), 1e-4), "log_decay": decay[:, None].expand(1, 2, n)}
    out = op(q, k, v, **rest)
    exact = op(q.double(), k.double(), v.double(), **{key: x.double() for key, x in rest.items()})
    assert (out - exact).abs().max() <= 2e-6 * exact.abs().max()
