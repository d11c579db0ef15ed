"""Factored biases against the tables they stand for."""

from __future__ import annotations

import pytest
import torch

import heedful
from heedful import patterns as p
from heedful.ops.bias import FactoredBias, alibi_bias, alibi_slopes, squared_distance_bias, svd_bias

DTYPE = torch.float64


def qkv(n=9, m=12, hq=4, hkv=4):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, hq, n, 6), (2, hkv, m, 6), (2, hkv, m, 6))
    return [torch.randn(s, generator=g, dtype=DTYPE).requires_grad_() for s in shapes]


@pytest.mark.parametrize("offset", [None, 0, 2])
def test_alibi_is_slope_times_key_minus_query(offset):
    n, m, slopes = 9, 12, alibi_slopes(4).double()
    bias = alibi_bias(slopes, n, m, query_offset=offset)
    start = m - n if offset is None else offset
    table = torch.tensor(
        [[[float(s) * (j - (i + start)) for j in range(m)] for i in range(n)] for s in slopes], dtype=DTYPE
    )
    torch.testing.assert_close(bias.dense()[0], table, rtol=0, atol=1e-12)
    assert bias.rank == 2
    assert torch.linalg.matrix_rank(bias.dense()[0, 0]) == 2


def test_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    torch.testing.assert_close(alibi_slopes(12)[0].item(), 2 ** (-8 / 12), rtol=1e-6, atol=0)


@pytest.mark.parametrize("space", [2, 3])
def test_squared_distance(space):
    x, y = torch.randn(2, 9, space, dtype=DTYPE), torch.randn(2, 12, space, dtype=DTYPE)
    weight = torch.randn(2, 4, 9, dtype=DTYPE)
    bias = squared_distance_bias(x, y, weight=weight)
    table = -weight[..., None] * (x[:, None, :, None] - y[:, None, None, :]).square().sum(-1)
    torch.testing.assert_close(bias.dense(), table, rtol=1e-12, atol=1e-12)
    assert bias.rank == space + 2
    assert torch.linalg.matrix_rank(bias.dense()[0, 0]) == space + 2


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
@pytest.mark.parametrize("hkv", [4, 2])
def test_attention_with_factors_is_attention_with_the_table(backend, hkv):
    leaves = qkv(hkv=hkv)
    factors = [
        torch.randn(2, 4, 9, 3, dtype=DTYPE).requires_grad_(),
        torch.randn(1, 1, 12, 3, dtype=DTYPE).requires_grad_(),
    ]
    got = heedful.attention(*leaves, bias=FactoredBias(*factors), pattern=p.Causal(), backend=backend)
    want = heedful.attention(
        *leaves, bias=factors[0] @ factors[1].mT, pattern=p.Causal(), backend="reference"
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(o.sin().sum(), leaves + factors) for o in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_the_bias_is_not_scaled():
    query, key, value = qkv()
    bias = alibi_bias(alibi_slopes(4).double(), 9, 12)
    out = heedful.attention(query, key, value, bias=bias, scale=0.3)
    weights = torch.softmax(query @ key.mT * 0.3 + bias.dense(), -1)
    torch.testing.assert_close(out, weights @ value, rtol=1e-12, atol=1e-12)


def test_full_rank_svd_is_exact_and_dropped_values_are_the_error():
    table = torch.randn(3, 10, 14, dtype=DTYPE)
    bias, _ = svd_bias(table, rank=10)
    torch.testing.assert_close(bias.dense()[0], table, rtol=1e-12, atol=1e-12)
    bias, _ = svd_bias(table, rank=4)
    s = torch.linalg.svdvals(table)
    error = torch.linalg.matrix_norm(bias.dense()[0] - table)
    torch.testing.assert_close(error, s[:, 4:].square().sum(-1).sqrt())


def test_svd_keeps_the_fewest_values_that_hold_the_energy():
    u, _ = torch.linalg.qr(torch.randn(8, 8, dtype=DTYPE))
    v, _ = torch.linalg.qr(torch.randn(8, 8, dtype=DTYPE))
    s = torch.tensor([[4.0, 2, 1, 0, 0, 0, 0, 0], [3.0, 0, 0, 0, 0, 0, 0, 0]], dtype=DTYPE)
    bias, ranks = svd_bias(u @ torch.diag_embed(s) @ v.mT, energy=0.95)
    assert ranks.tolist() == [2, 1]  # (16 + 4) / 21 = 0.952
    assert bias.rank == 2
    torch.testing.assert_close(
        torch.linalg.svdvals(bias.dense()[0])[:, :2], torch.tensor([[4.0, 2.0], [3.0, 0.0]], dtype=DTYPE)
    )


@pytest.mark.door
def test_errors_at_the_door():
    with pytest.raises(ValueError, match="factors have shapes"):
        FactoredBias(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 3))
    with pytest.raises(ValueError, match="energy is 0"):
        svd_bias(torch.zeros(1, 2, 2), energy=0)
    with pytest.raises(ValueError, match="rank is 3"):
        svd_bias(torch.zeros(1, 2, 2), rank=3)
    query, key, value = qkv(hkv=2)
    factors = torch.zeros(1, 1, 9, 2, dtype=DTYPE), torch.zeros(1, 4, 12, 2, dtype=DTYPE)
    with pytest.raises(ValueError, match="key factors for 4 heads"):
        heedful.attention(query, key, value, bias=FactoredBias(*factors), backend="tiled")
