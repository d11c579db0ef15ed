from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from heedful.mixers.grid import shvit
from heedful.mixers.grid.shvit import SingleHeadPartialAttention


def batch_norm(bn: nn.BatchNorm2d, t: Tensor, train: bool) -> Tensor:
    """t (b, n, c): the moments of all images and places, or the running ones."""
    mean, var = bn.running_mean, bn.running_var
    if train:
        mean = t.mean((0, 1))
        var = ((t - mean) ** 2).mean((0, 1))
    return (t - mean) / (var + 1e-5).sqrt() * bn.weight + bn.bias


def transcription(m: SingleHeadPartialAttention, x: Tensor, train: bool) -> Tensor:
    """The numbered steps on tokens, one query at a time."""
    p, d = m.partial_dim, m.qk_dim
    tokens = x.flatten(2).mT
    part, rest = tokens[..., :p], tokens[..., p:]  # 1
    mean = part.mean((1, 2), keepdim=True)  # 2
    var = ((part - mean) ** 2).mean((1, 2), keepdim=True)
    part = (part - mean) / (var + 1e-5).sqrt() * m.pre_norm.weight + m.pre_norm.bias
    qkv = batch_norm(m.qkv.bn, part @ m.qkv.c.weight[:, :, 0, 0].T, train)  # 3
    images = []
    for one in qkv:
        q, k, v = one[:, :d], one[:, d : 2 * d], one[:, 2 * d :]
        rows = []
        for i in range(len(q)):
            weight = (k @ q[i] / d**0.5).exp()
            rows.append((weight / weight.sum()) @ v)  # 4
        images.append(torch.stack(rows))
    y = torch.cat([torch.stack(images), rest], dim=-1)
    y = (y * (y > 0)) @ m.proj[1].c.weight[:, :, 0, 0].T  # 5
    return batch_norm(m.proj[1].bn, y, train).mT.unflatten(2, x.shape[2:])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"partial_dim": 5, "qk_dim": 4}, (3, 4)),
        ({"partial_dim": 12, "qk_dim": 3}, (2, 3)),
        ({}, (1, 5)),
    ],
)
def test_equals_transcription_with_gradients(options, size, train):
    torch.manual_seed(0)
    m = SingleHeadPartialAttention(12, **options, dtype=torch.float64).train(train)
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn_like(p))
        for bn in (m.qkv.bn, m.proj[1].bn):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 12, *size, dtype=torch.float64, requires_grad=True)
    literal, ours = transcription(m, x, train), m(x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


def test_gradcheck():
    torch.manual_seed(0)
    m = SingleHeadPartialAttention(4, partial_dim=3, qk_dim=2, dtype=torch.float64).eval()
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(m, (x,))


def test_the_other_channels_pass_by():
    torch.manual_seed(0)
    m = SingleHeadPartialAttention(16, partial_dim=5, dtype=torch.float64).eval()
    with torch.no_grad():
        m.proj[1].c.weight.copy_(torch.eye(16)[:, :, None, None])
        m.proj[1].bn.running_var.fill_(1 - 1e-5)
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(m(x)[:, 5:], x[:, 5:].clamp(min=0))
    other = x.clone()
    other[:, 5:] += 1
    torch.testing.assert_close(m(other)[:, :5], m(x)[:, :5])  # and attention does not read them


def test_places_can_be_permuted():
    torch.manual_seed(0)
    m = SingleHeadPartialAttention(16, dtype=torch.float64).eval()
    x = torch.randn(1, 16, 1, 9, dtype=torch.float64)
    order = torch.randperm(9)
    torch.testing.assert_close(m(x[..., order]), m(x)[..., order])


def test_both_ways_to_attend_agree():
    torch.manual_seed(0)
    m = SingleHeadPartialAttention(16, dtype=torch.float64).eval()
    x = torch.randn(2, 16, 3, 11, dtype=torch.float64)
    y = m(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shvit, "SMALL", 32)
        torch.testing.assert_close(m(x), y)


@pytest.mark.parametrize(
    ("dim", "partial"),
    [(224, 48), (320, 68), (308, 66), (448, 96), (352, 75), (336, 72)],
)
def test_default_part_is_that_of_the_published_models(dim, partial):
    m = SingleHeadPartialAttention(dim)
    assert m.partial_dim == partial
    width = 32 + partial
    count = 2 * partial + partial * width + 2 * width + dim * dim + 2 * dim
    assert sum(p.numel() for p in m.parameters()) == count


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="partial_dim is 9, must be at most dim, which is 8"):
        SingleHeadPartialAttention(8, partial_dim=9)
    with pytest.raises(ValueError, match="qk_dim is 0, must be a whole number"):
        SingleHeadPartialAttention(8, qk_dim=0)
