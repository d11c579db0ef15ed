from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful.mixers.grid.patnet import (
    PartialChannelAttention,
    PartialSelfAttention,
    PartialSpatialAttention,
    distance_bucket,
)


def batch_norm(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        t.view(-1, 1, 1) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def hardsigmoid(x: Tensor) -> Tensor:
    return (x / 6 + 0.5).clamp(0, 1)


def random(m: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn_like(p))
        for name, b in m.named_buffers():
            if name.endswith("mean"):
                b.normal_()
            elif name.endswith("var"):
                b.uniform_(0.5, 2)
    return m.eval()


def channel(m: PartialChannelAttention, x: Tensor) -> Tensor:
    t = m.dim // 4
    rest = x[:, t:]
    n = rest.shape[2] * rest.shape[3]
    mean = rest.sum((2, 3)) / n
    std = ((rest - mean[:, :, None, None]).square().sum((2, 3)) / (n - 1)).sqrt()
    z = mean @ m.style.weight[:, :, 0, 0].T + std @ m.style.weight[:, :, 0, 1].T
    gate = hardsigmoid(batch_norm(m.style_norm, z[:, :, None, None]))
    return torch.cat([F.conv2d(x[:, :t], m.conv.weight, padding=1), batch_norm(m.norm, rest * gate)], 1)


def self_attention(m: PartialSelfAttention, x: Tensor) -> Tensor:
    """One head and one query at a time."""
    t, (height, width) = m.dim // 4, x.shape[2:]
    places = [(i, j) for i in range(height) for j in range(width)]
    d = m.rest // m.heads
    images = []
    for image in x[:, t:]:
        tokens = image.flatten(1).T
        tokens = tokens - tokens.mean(1, keepdim=True)
        tokens = tokens / (tokens.square().mean(1, keepdim=True) + 1e-6).sqrt()
        qkv = (tokens * m.norm.weight + m.norm.bias) @ m.qkv.weight.T
        rows = []
        for i, here in enumerate(places):
            heads = []
            for h in range(m.heads):
                q, k, v = (qkv[:, s * m.rest + h * d : s * m.rest + (h + 1) * d] for s in range(3))
                bias = [m.bias_table[h, 40 + round(math.dist(here, there))] for there in places]
                weight = (k @ q[i] / d**0.5 + torch.stack(bias)).exp()
                heads.append((weight / weight.sum()) @ v)
            rows.append(m.proj.weight @ torch.cat(heads) + m.proj.bias)
        images.append(torch.stack(rows).T.reshape(m.rest, height, width))
    return torch.cat([F.conv2d(x[:, :t], m.conv.weight, padding=1), torch.stack(images)], 1)


def spatial(m: PartialSpatialAttention, x: Tensor) -> Tensor:
    cut = m.dim - m.dim // 2
    a, b = x[:, :cut], batch_norm(m.mix_norm, x[:, cut:])
    gate = hardsigmoid((a * m.gate.weight[0]).sum(1, keepdim=True))
    return torch.cat(
        [batch_norm(m.gate_norm, a * gate), torch.einsum("oc,bchw->bohw", m.mix.weight[..., 0, 0], b)], 1
    )


@pytest.mark.parametrize(
    ("cls", "options", "literal"),
    [
        (PartialChannelAttention, {}, channel),
        (PartialSelfAttention, {"heads": 3}, self_attention),
        (PartialSpatialAttention, {}, spatial),
    ],
)
def test_equals_transcription_with_gradients(cls, options, literal):
    m = random(cls(12, **options, dtype=torch.float64))
    x = torch.randn(2, 12, 3, 4, dtype=torch.float64, requires_grad=True)
    ours, wanted = m(x), literal(m, x)
    torch.testing.assert_close(ours, wanted)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(wanted, wrt, up))


@pytest.mark.parametrize("cls", [PartialChannelAttention, PartialSelfAttention])
def test_a_quarter_is_convolved_and_the_rest_attends(cls):
    m = random(cls(16, dtype=torch.float64))
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    first, last = x.clone(), x.clone()
    first[:, :4] += 1
    last[:, 4:] = last[:, 4:].flip(3) + 1
    torch.testing.assert_close(m(first)[:, 4:], m(x)[:, 4:])
    torch.testing.assert_close(m(last)[:, :4], m(x)[:, :4])
    assert not torch.allclose(m(last)[:, 4:], m(x)[:, 4:])


def test_a_single_pixel_has_no_deviation():
    m = random(PartialChannelAttention(16, dtype=torch.float64))
    x = torch.randn(2, 16, 1, 1, dtype=torch.float64)
    gate = hardsigmoid(batch_norm(m.style_norm, F.conv2d(x[:, 4:], m.style.weight[..., :1])))
    torch.testing.assert_close(m(x)[:, 4:], batch_norm(m.norm, x[:, 4:] * gate))


def test_buckets_of_distance_grow_by_pixels_then_by_logarithm():
    row = distance_bucket(1, 400, torch.device("cpu"))[0]
    assert row[:21].tolist() == list(range(21))
    for r in (22, 30, 57, 100, 159):
        assert int(row[r]) == round(20 + 20 * math.log(r / 20) / math.log(8))
    assert int(row[160]) == int(row[399]) == 40
    grid = distance_bucket(4, 6, torch.device("cpu"))
    assert torch.equal(grid, grid.T) and int(grid[0, 3 * 6 + 4]) == 5  # 3 down, 4 across


def test_dropout_in_training_alone():
    torch.manual_seed(0)
    m = PartialSelfAttention(16, dropout=0.5)
    x = torch.randn(1, 16, 6, 6)
    share = float((m.train()(x)[:, 4:] == 0).float().mean())
    assert 0.4 < share < 0.6  # of 432
    assert (m.eval()(x)[:, 4:] == 0).sum() == 0


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="parts is 3, must divide dim"):
        PartialChannelAttention(16, parts=3)
    with pytest.raises(ValueError, match="parts is 1, must be at least 2"):
        PartialSelfAttention(16, parts=1)
    with pytest.raises(ValueError, match="heads is 5, must divide the channels that attend, which is 12"):
        PartialSelfAttention(16, heads=5)
    with pytest.raises(ValueError, match="dim is 1, must be at least 2"):
        PartialSpatialAttention(1)
