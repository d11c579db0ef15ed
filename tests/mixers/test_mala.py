from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.mixers.grid.mala import MagnitudeAwareLinearAttention, mala_attention


def rotation(d: int, row: int, column: int) -> Tensor:
    """The d x d matrix that turns neighbouring channels: the first half by the row, then by the column."""
    matrix = torch.zeros(d, d, dtype=torch.float64)
    for i in range(d // 2):
        place, j = (row, i) if i < d // 4 else (column, i - d // 4)
        angle = place / 10000 ** (j / max(1, d // 4 - 1))
        matrix[2 * i, 2 * i] = matrix[2 * i + 1, 2 * i + 1] = math.cos(angle)
        matrix[2 * i, 2 * i + 1], matrix[2 * i + 1, 2 * i] = -math.sin(angle), math.sin(angle)
    return matrix


def transcription(m: MagnitudeAwareLinearAttention, x: Tensor) -> Tensor:
    """The numbered steps with all weights written out."""
    batch, dim, height, width = x.shape
    n, d = height * width, dim // m.heads
    places = [(r, c) for r in range(height) for c in range(width)]
    turns = torch.stack([rotation(d, r, c) for r, c in places])
    images = []
    for b in range(batch):
        qkvo = x[b].flatten(1).T @ m.qkvo.weight[:, :, 0, 0].T + m.qkvo.bias  # 1
        q, k, v, o = (qkvo[:, i * dim : (i + 1) * dim] for i in range(4))
        local = F.conv2d(
            v.T.reshape(1, dim, height, width), m.lepe.weight, m.lepe.bias, padding=2, groups=dim
        )
        heads = []
        for h in range(m.heads):
            own = slice(h * d, (h + 1) * d)
            qh, kh = (torch.where(t > 0, t + 1, t.clamp(max=0).exp()) for t in (q[:, own], k[:, own]))  # 2
            q_r, k_r = (torch.einsum("nij,nj->ni", turns, t) for t in (qh, kh))  # 4
            rows = []
            for i in range(n):
                z = (kh @ qh[i]).sum() / (math.sqrt(d) * n)  # 3
                s = (k_r @ q_r[i]) / (math.sqrt(d) * n)  # 5
                weight = s * (1 + 1 / (z + 1e-6)) - z / n  # 6
                rows.append(weight @ v[:, own])
            heads.append(torch.stack(rows))
        y = (torch.cat(heads, 1) + local[0].flatten(1).T) * o  # 7
        y = y @ m.proj.weight[:, :, 0, 0].T + m.proj.bias
        images.append(y.T.reshape(dim, height, width))
    return torch.stack(images)


@pytest.mark.parametrize(("dim", "heads", "size"), [(24, 2, (3, 4)), (8, 2, (1, 5)), (16, 1, (1, 1))])
def test_equals_transcription_with_gradients(dim, heads, size):
    torch.manual_seed(0)
    m = MagnitudeAwareLinearAttention(dim, heads=heads, dtype=torch.float64)
    with torch.no_grad():
        m.qkvo.weight.mul_(3)
    x = torch.randn(2, dim, *size, dtype=torch.float64, requires_grad=True)
    ours, literal = m(x), transcription(m, x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


def test_gradcheck():
    torch.manual_seed(0)
    q, k = (torch.rand(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: mala_attention(q, k, v, angles=angles), (q, k, v))


def weights(q: Tensor, k: Tensor) -> Tensor:
    return mala_attention(q, k, torch.eye(k.shape[2], dtype=q.dtype)[None, None])


@pytest.mark.parametrize("length", [0.1, 1.0, 7.0])
def test_longer_queries_have_sharper_weights(length):
    torch.manual_seed(0)
    q, k = torch.rand(1, 1, 6, 4, dtype=torch.float64) + 0.1, torch.rand(1, 1, 9, 4, dtype=torch.float64)
    s = q @ k.mT / (9 * 2)
    total = s.sum(-1, keepdim=True)
    expected = s / total + length * (s - total / 9)
    got = weights(length * q, k)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.sum(-1), torch.ones(1, 1, 6, dtype=torch.float64), rtol=1e-4, atol=0)
    assert (weights(2 * length * q, k).amax(-1) > got.amax(-1)).all()


def test_parameter_count():
    assert (
        sum(p.numel() for p in MagnitudeAwareLinearAttention(64, heads=4).parameters()) == 5 * 64**2 + 31 * 64
    )


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 3, must divide dim"):
        MagnitudeAwareLinearAttention(32, heads=3)
    with pytest.raises(ValueError, match="heads is 4, must leave a multiple of 4 channels a head, not 6"):
        MagnitudeAwareLinearAttention(24, heads=4)
