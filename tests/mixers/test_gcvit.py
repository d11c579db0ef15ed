from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.mixers.grid.gcvit import (
    FusedConv,
    GCViTWindowAttention,
    GlobalContextAttention,
    GlobalQueryGenerator,
    GlobalQueryWindowAttention,
)


def transcription(m: torch.nn.Module, x: Tensor, query: Tensor | None) -> Tensor:
    """One image, one window, one head and one token at a time; tokens past the map do not exist."""
    w, d = m.window, m.dim // m.heads
    height, width = x.shape[2:]
    images = []
    for b in range(len(x)):
        rows: dict[tuple[int, int], Tensor] = {}
        for top in range(0, height, w):
            for left in range(0, width, w):
                places = [
                    (i, j)
                    for i in range(top, min(top + w, height))
                    for j in range(left, min(left + w, width))
                ]
                projected = {at: m.qkv.weight @ x[b, :, at[0], at[1]] + m.qkv.bias for at in places}
                for i, j in places:
                    heads = []
                    for h in range(m.heads):
                        own = slice(h * d, (h + 1) * d)
                        q = projected[i, j][: m.dim] if query is None else query[b, :, i - top, j - left]
                        logits, values = [], []
                        for r, s in places:
                            key, value = projected[r, s][-2 * m.dim : -m.dim], projected[r, s][-m.dim :]
                            place = (i - r + w - 1) * (2 * w - 1) + j - s + w - 1
                            logits.append(q[own] @ key[own] / d**0.5 + m.relative_bias[place, h])
                            values.append(value[own])
                        weight = torch.stack(logits).exp()
                        heads.append((weight[:, None] * torch.stack(values)).sum(0) / weight.sum())
                    rows[i, j] = m.proj.weight @ torch.cat(heads) + m.proj.bias
        images.append(
            torch.stack([torch.stack([rows[i, j] for j in range(width)], -1) for i in range(height)], 1)
        )
    return torch.stack(images)


def assert_equal_with_gradients(m: torch.nn.Module, x: Tensor, ours: Tensor, literal: Tensor) -> None:
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *m.parameters()), torch.randn_like(ours)
    # The bias of all keys of a query changes nothing: its gradient is rounding, hence atol.
    torch.testing.assert_close(
        torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("size", [(4, 2), (3, 5)])
@pytest.mark.parametrize("kind", [GCViTWindowAttention, GlobalQueryWindowAttention])
def test_equals_transcription_with_gradients(kind: type, size: tuple[int, int]) -> None:
    torch.manual_seed(sum(size))
    m = kind(6, heads=2, window=2, dtype=torch.float64)
    torch.nn.init.normal_(m.relative_bias)
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 6, 2, 2, dtype=torch.float64) if kind is GlobalQueryWindowAttention else None
    ours = m(x) if query is None else m(x, query=query)
    assert_equal_with_gradients(m, x, ours, transcription(m, x, query))


def fused(x: Tensor, m: FusedConv) -> Tensor:
    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    y = gelu(F.conv2d(x, m.depthwise.weight, padding=1, groups=x.shape[1]))
    gate = gelu(y.mean((2, 3)) @ m.squeeze.weight.T) @ m.excite.weight.T
    y = y / (1 + (-gate).exp())[:, :, None, None]
    return torch.einsum("oc,bchw->bohw", m.pointwise.weight[:, :, 0, 0], y)


@pytest.mark.parametrize("pools", [0, 2])
def test_generator_equals_transcription_with_gradients(pools: int) -> None:
    torch.manual_seed(pools)
    m = GlobalQueryGenerator(8, window=3, pools=pools, dtype=torch.float64)
    x = torch.randn(2, 8, *((12, 12) if pools else (3, 3)), dtype=torch.float64, requires_grad=True)
    y = x
    for conv in m.convs:
        y = y + fused(y, conv)
        if pools:
            side = y.shape[-1] // 2
            padded = F.pad(y, (1, 1, 1, 1), value=-torch.inf)
            y = torch.stack(
                [padded[..., i : i + 2 * side : 2, j : j + 2 * side : 2] for i in range(3) for j in range(3)]
            ).amax(0)
    assert len(m.convs) == max(pools, 1)
    assert_equal_with_gradients(m, x, m(x), y)


def test_a_window_depends_on_its_tokens_and_the_query_alone() -> None:
    torch.manual_seed(0)
    m = GlobalQueryWindowAttention(8, heads=2, window=3, dtype=torch.float64)
    x, query = torch.randn(1, 8, 6, 6, dtype=torch.float64), torch.randn(1, 8, 3, 3, dtype=torch.float64)
    y = m(x, query=query)
    other = x.clone()
    other[:, :, 3:] += 1
    changed = m(other, query=query)
    torch.testing.assert_close(changed[:, :, :3], y[:, :, :3])
    assert not torch.allclose(changed[:, :, 3:], y[:, :, 3:])
    x[:, :, :3, 3:] = x[:, :, :3, :3]  # two windows of the same tokens answer the same queries
    y = m(x, query=query)
    torch.testing.assert_close(y[:, :, :3, 3:], y[:, :, :3, :3])


def test_alone_the_queries_come_from_the_map() -> None:
    torch.manual_seed(0)
    m = GlobalContextAttention(8, heads=2, window=2, pools=1).eval()
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(m(x), m.attention(x, query=m.generator(x)))


def test_parameter_counts() -> None:
    def count(m: torch.nn.Module) -> int:
        return sum(p.numel() for p in m.parameters())

    assert count(GCViTWindowAttention(16, heads=4, window=3)) == 4 * 16 * 17 + 25 * 4
    assert count(GlobalQueryWindowAttention(16, heads=4, window=3)) == 3 * 16 * 17 + 25 * 4
    assert count(FusedConv(16)) == 9 * 16 + 2 * 4 * 16 + 16 * 16


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="heads is 3, must divide dim"):
        GCViTWindowAttention(16, heads=3)
    with pytest.raises(ValueError, match="window is 0"):
        GlobalQueryWindowAttention(16, heads=4, window=0)
    with pytest.raises(ValueError, match="query has shape"):
        GlobalQueryWindowAttention(16, heads=4)(torch.zeros(1, 16, 7, 7), query=torch.zeros(1, 16, 2, 2))
