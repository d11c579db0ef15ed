from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.mixers.grid.rala import (
    RALAVanillaAttention,
    RankAugmentedLinearAttention,
    rala_attention,
)
from heedful.ops.linear import linear_attention

KINDS = [RankAugmentedLinearAttention, RALAVanillaAttention]


def turn(t: Tensor, row: int, column: int) -> Tensor:
    """Neighbouring channels as complex numbers: the first half turns with the row, the other the column."""
    d = t.shape[-1]
    speed = [10000 ** -(i / max(1, d // 4 - 1)) for i in range(d // 4)]
    angles = torch.tensor([row * s for s in speed] + [column * s for s in speed], dtype=torch.float64)
    pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(pairs).flatten(-2)


def features(t: Tensor) -> Tensor:
    return torch.where(t > 0, t + 1, t.clamp(max=0).exp())


def transcription(m: RankAugmentedLinearAttention, x: Tensor) -> Tensor:
    """The numbered steps, one image, one head and one query at a time."""
    batch, dim, height, width = x.shape
    n, d = height * width, dim // m.heads
    places = [(r, c) for r in range(height) for c in range(width)]
    images = []
    for b in range(batch):
        tokens = torch.stack([x[b, :, r, c] for r, c in places])
        qkvo = tokens @ m.qkvo.weight[:, :, 0, 0].T + m.qkvo.bias  # 1
        q, k, v, o = (qkvo[:, i * dim : (i + 1) * dim] for i in range(4))
        image = F.pad(v.reshape(height, width, dim), (0, 0, 2, 2, 2, 2))
        local = m.lepe.bias + sum(
            image[i : i + height, j : j + width] * m.lepe.weight[:, 0, i, j]
            for i in range(5)
            for j in range(5)
        )  # 2
        heads = []
        for h in range(m.heads):
            own = slice(h * d, (h + 1) * d)
            qh, kh, vh = q[:, own], k[:, own], v[:, own]
            if type(m) is RankAugmentedLinearAttention:
                qh, kh = features(qh), features(kh)  # 3
                score = (kh @ qh.mean(0) / math.sqrt(d)).exp()  # 4
                kh = kh * (score / score.sum() * n)[:, None]
            q_r = torch.stack([turn(t, *p) for t, p in zip(qh, places, strict=True)])  # 5
            k_r = torch.stack([turn(t, *p) for t, p in zip(kh, places, strict=True)])
            rows = []
            for i in range(n):
                if type(m) is RankAugmentedLinearAttention:
                    z = 1 / (qh[i] @ kh.mean(0) + 1e-6)  # 6
                    rows.append(sum((q_r[i] @ k_r[j]) * vh[j] for j in range(n)) / n * z)  # 7
                else:
                    weight = (k_r @ q_r[i] / math.sqrt(d)).exp()
                    rows.append((weight / weight.sum()) @ vh)
            heads.append(torch.stack(rows))
        y = (torch.cat(heads, 1) + local.flatten(0, 1)) * o  # 8
        y = y @ m.proj.weight[:, :, 0, 0].T + m.proj.bias
        images.append(y.T.reshape(dim, height, width))
    return torch.stack(images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "heads", "size"), [(24, 2, (3, 4)), (8, 2, (1, 5)), (16, 1, (1, 1))])
def test_equals_transcription_with_gradients(kind, dim, heads, size):
    torch.manual_seed(0)
    m = kind(dim, heads=heads, dtype=torch.float64)
    with torch.no_grad():
        m.qkvo.weight.mul_(3)  # far from uniform weights
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
    assert torch.autograd.gradcheck(lambda q, k, v: rala_attention(q, k, v, angles=angles), (q, k, v))


def test_equal_keys_give_plain_linear_attention():
    torch.manual_seed(0)
    q = torch.rand(1, 2, 6, 4, dtype=torch.float64)
    k = torch.rand(1, 2, 1, 4, dtype=torch.float64).expand(1, 2, 9, 4)
    v = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    plain = linear_attention(q, k, v, causal=False, normalize=True)
    torch.testing.assert_close(rala_attention(q, k, v), plain, rtol=1e-5, atol=1e-5)


def test_keys_the_mean_query_attends_to_gain_weight():
    torch.manual_seed(0)
    q, k = torch.rand(1, 1, 6, 4, dtype=torch.float64), torch.rand(1, 1, 9, 4, dtype=torch.float64)
    weights = rala_attention(q, k, torch.eye(9, dtype=torch.float64)[None, None])
    plain = (q @ k.mT) / (q @ k.mT).sum(-1, keepdim=True)
    alpha = 9 * (k[0, 0] @ q[0, 0].mean(0) / 2).softmax(0)
    assert math.isclose(alpha.mean().item(), 1)
    ratio = weights / plain
    torch.testing.assert_close(ratio / ratio[..., :1], (alpha / alpha[0]).expand(1, 1, 6, 9))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 6, dtype=torch.float64), rtol=1e-5, atol=0)


def test_gate_lifts_the_rank_above_the_head_width():
    torch.manual_seed(0)
    m = RankAugmentedLinearAttention(8, heads=2, dtype=torch.float64)
    with torch.no_grad():
        m.lepe.weight.zero_()
        m.lepe.bias.zero_()
        m.proj.weight.copy_(torch.eye(8)[:, :, None, None])
        m.proj.bias.zero_()
        m.qkvo.weight.mul_(3)
        m.qkvo.weight[16:20] = m.qkvo.weight[20:24]  # both heads read the same values
        m.qkvo.bias[16:20] = m.qkvo.bias[20:24]
    x = torch.randn(1, 8, 6, 5, dtype=torch.float64)
    gated = torch.linalg.matrix_rank(m(x)[0].flatten(1))
    with torch.no_grad():
        m.qkvo.weight[24:].zero_()
        m.qkvo.bias[24:].fill_(1)
        m.qkvo.weight[:4] = m.qkvo.weight[4:8]
        m.qkvo.bias[:4] = m.qkvo.bias[4:8]
        m.qkvo.weight[8:12] = m.qkvo.weight[12:16]
        m.qkvo.bias[8:12] = m.qkvo.bias[12:16]
    assert torch.linalg.matrix_rank(m(x)[0].flatten(1)) == 4  # of one head
    assert gated == 8


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_count(kind):
    assert sum(p.numel() for p in kind(64, heads=4).parameters()) == 5 * 64**2 + 31 * 64


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 3, must divide dim"):
        RankAugmentedLinearAttention(32, heads=3)
    with pytest.raises(ValueError, match="heads is 4, must leave a multiple of 4 channels a head, not 6"):
        RankAugmentedLinearAttention(24, heads=4)
