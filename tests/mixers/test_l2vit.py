from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful.mixers.linear.l2vit import ReLULinearAttention


def transcription(
    m: ReLULinearAttention, x: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The numbered steps with all products written out; also the denominators, a head after another."""
    d, c, rows, totals = m.dim // m.heads, m.dim, [], []
    for b, tokens in enumerate(x):
        q, k, v = (tokens @ m.qkv.weight[i * c : (i + 1) * c].T for i in range(3))  # 1
        if m.qkv.bias is not None:
            q, k, v = (t + m.qkv.bias[i * c : (i + 1) * c] for i, t in enumerate((q, k, v)))
        heads = []
        for h in range(m.heads):
            own = slice(h * d, (h + 1) * d)
            qh, kh = q[:, own] * (q[:, own] > 0), k[:, own] * (k[:, own] > 0)
            products = qh @ kh.T
            if mask is not None:
                products = products * mask[b]
            total = products.sum(1, keepdim=True)
            totals.append(total)
            bounded = torch.where(total < 100, torch.full_like(total, 100), total)  # 2
            heads.append(m.temperature[h, 0, 0] * (products / bounded) @ v[:, own])  # 3
        rows.append(torch.cat(heads, 1) @ m.proj.weight.T + m.proj.bias)  # 4
    return torch.stack(rows), totals


def both_sides() -> tuple[ReLULinearAttention, Tensor]:
    """A mixer and tokens whose denominators lie below and above the bound."""
    torch.manual_seed(0)
    m = ReLULinearAttention(12, heads=3, dtype=torch.float64)
    with torch.no_grad():
        m.qkv.weight.mul_(6)
        m.temperature.uniform_(0.3, 2)
    return m, torch.randn(2, 23, 12, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_transcription_with_gradients(masked):
    m, x = both_sides()
    mask = torch.rand(2, 23) < 0.8 if masked else None
    ours, (literal, totals) = m(x, mask=mask), transcription(m, x, mask)
    total = torch.stack(totals).view(2, 3, 23, 1)
    assert 0.2 < (total < 100).double().mean() < 0.8
    torch.testing.assert_close(ours, literal)
    torch.testing.assert_close(m.denominators(x, mask=mask), total)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


def test_weights_sum_to_the_temperature_above_the_bound_and_to_less_below():
    m, x = both_sides()
    with torch.no_grad():  # values of 1, and no output projection
        m.qkv.weight[24:].zero_()
        m.qkv.bias[24:].fill_(1)
        m.proj.weight.copy_(torch.eye(12))
        m.proj.bias.zero_()
        sums = m(x).unflatten(-1, (3, 4)).transpose(1, 2)
        expected = m.temperature * (m.denominators(x) / 100).clamp(max=1)
    torch.testing.assert_close(sums, expected.expand_as(sums))


def test_zero_queries_give_the_bias_of_the_output():
    m = ReLULinearAttention(12, heads=3)
    with torch.no_grad():
        m.qkv.bias[:12].fill_(-100)
    y = m(torch.randn(1, 5, 12))
    torch.testing.assert_close(y, m.proj.bias.expand(1, 5, 12))


def test_starts_and_counts():
    m = ReLULinearAttention(64, heads=4)
    assert torch.equal(m.temperature, torch.full((4, 1, 1), 1 / math.sqrt(16)))
    assert sum(p.numel() for p in m.parameters()) == (64 * 192 + 192) + (64 * 64 + 64) + 4
    without = ReLULinearAttention(64, heads=4, qkv_bias=False)
    assert sum(p.numel() for p in without.parameters()) == 64 * 192 + (64 * 64 + 64) + 4


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 5, must divide dim"):
        ReLULinearAttention(12, heads=5)
    m, x = ReLULinearAttention(12, heads=3), torch.randn(1, 5, 12)
    with pytest.raises(ValueError, match="state is given, must be None"):
        m(x, state=object())
    with pytest.raises(ValueError, match="context is given, must be None"):
        m(x, context=x)
