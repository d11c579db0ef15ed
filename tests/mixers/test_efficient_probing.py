from __future__ import annotations

import math

import pytest
import torch

from heedful.mixers.pooling.efficient_probing import EfficientProbing


def drawn(pool: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The pool in float64 with parameters large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    pool.double()
    with torch.no_grad():
        for p in pool.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return pool


def transcription(
    x: torch.Tensor, queries: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """One output channel of one row at a time."""
    count, out = len(queries), len(weight)
    rows = []
    for row in x:
        for c in range(out):
            q = queries[c // (out // count)]
            scores = [(q * token).sum() / math.sqrt(len(q)) for token in row]
            total = sum(s.exp() for s in scores)
            values = [(weight[c] * token).sum() + (0 if bias is None else bias[c]) for token in row]
            rows.append(sum(s.exp() * v for s, v in zip(scores, values, strict=True)) / total)
    return torch.stack(rows).view(len(x), out)


@pytest.mark.parametrize(("queries", "d_out", "bias"), [(1, 1, False), (4, 1, False), (3, 2, True)])
def test_equals_transcription_with_gradients(queries: int, d_out: int, bias: bool) -> None:
    pool = drawn(EfficientProbing(12, queries=queries, d_out=d_out, qkv_bias=bias))
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    literal = transcription(x, pool.cls_token[0], pool.v.weight, pool.v.bias)
    torch.testing.assert_close(pool(x), literal)
    up = torch.randn(2, 12 // d_out, dtype=torch.float64)
    of = (x, *pool.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(pool(x), of, up), torch.autograd.grad(literal, of, up), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck() -> None:
    pool = drawn(EfficientProbing(6, queries=3))
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool, (x,))


def test_one_zero_query_is_mean_pooling_and_a_linear() -> None:
    pool = drawn(EfficientProbing(12, queries=1))
    torch.nn.init.zeros_(pool.cls_token)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(pool(x), pool.v(x.mean(1)))


def test_equal_queries_are_one_query() -> None:
    one, many = drawn(EfficientProbing(12, queries=1)), drawn(EfficientProbing(12, queries=4))
    with torch.no_grad():
        many.v.weight.copy_(one.v.weight)
        many.cls_token.copy_(one.cls_token.expand(-1, 4, -1))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(many(x), one(x))


def test_each_slice_depends_on_its_query_alone() -> None:
    pool = drawn(EfficientProbing(12, queries=4))
    x = torch.randn(1, 7, 12, dtype=torch.float64)
    for m in range(4):
        (grad,) = torch.autograd.grad(pool(x)[0, 3 * m : 3 * m + 3].sum(), pool.cls_token)
        assert grad[0, m].abs().min() > 0
        assert grad[0, [i for i in range(4) if i != m]].eq(0).all()


def test_maps_are_the_weights_of_the_pool() -> None:
    pool = drawn(EfficientProbing(12, queries=4))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [0] * 7]).bool()
    maps = pool.attention_maps(x, mask=mask)
    torch.testing.assert_close(maps.sum(-1), mask.any(1).double()[:, None].expand(2, 4))
    assert maps.masked_select(~mask[:, None]).eq(0).all()
    pooled = torch.cat([maps[:, m, None] @ pool.v(x)[..., 3 * m : 3 * m + 3] for m in range(4)], -1)[:, 0]
    torch.testing.assert_close(pool(x, mask=mask), pooled)


def test_mask_leaves_tokens_out() -> None:
    pool = drawn(EfficientProbing(12, queries=4, qkv_bias=True))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [0] * 7]).bool()
    spoilt = x.masked_fill(~mask[..., None], math.nan).requires_grad_()
    y = pool(spoilt, mask=mask)
    torch.testing.assert_close(y[:1], pool(x[:1, [0, 1, 3]]))
    assert y[1].eq(0).all()
    y.sum().backward()
    assert spoilt.grad.isfinite().all()
    assert pool.cls_token.grad.isfinite().all()


def test_parameters() -> None:
    pool = EfficientProbing(768)
    assert sum(p.numel() for p in pool.parameters()) == 589_824 + 24_576
    head = torch.nn.Sequential(pool, torch.nn.BatchNorm1d(768, affine=False), torch.nn.Linear(768, 1000))
    assert sum(p.numel() for p in head.parameters()) == 1_383_400
    assert {n: tuple(p.shape) for n, p in EfficientProbing(24, queries=3, d_out=2).named_parameters()} == {
        "cls_token": (1, 3, 24),
        "v.weight": (12, 24),
    }
    assert 0.018 < pool.cls_token.std() < 0.022


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="d_out is 5, must divide dim"):
        EfficientProbing(12, d_out=5)
    with pytest.raises(ValueError, match="queries is 4, must divide dim / d_out, which is 6"):
        EfficientProbing(12, queries=4, d_out=2)
    with pytest.raises(ValueError, match="x has shape"):
        EfficientProbing(12, queries=4).attention_maps(torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="mask has shape"):
        EfficientProbing(12, queries=4)(torch.zeros(2, 3, 12), mask=torch.ones(2, 4).bool())
