from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful.mixers.grid.inline_attention import (
    InLineAttention,
    InLineAttentionCSwin,
    InLineAttentionDeiT,
    inline_attention,
)

FEATURES = {
    "identity": lambda x: x,
    "relu": lambda x: x * (x > 0),
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "exp": lambda x: torch.exp(x / 5),
}


def literal_weights(q: Tensor, k: Tensor) -> Tensor:
    """(n, m), one at a time."""
    n, m, d = len(q), len(k), q.shape[1]
    s = torch.stack([torch.stack([q[i] @ k[j] / (m * math.sqrt(d)) for j in range(m)]) for i in range(n)])
    return s - s.sum(1, keepdim=True) / m + 1 / m


def literal_heads(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    d = q.shape[1] // heads
    own = [slice(h * d, (h + 1) * d) for h in range(heads)]
    return torch.cat([literal_weights(q[:, o], k[:, o]) @ v[:, o] for o in own], 1)


def literal_local(mlp: nn.Sequential, mean: Tensor, image: Tensor, heads: int) -> Tensor:
    """mean (c,), image (height, width, c): the grouped layers group by group, the convolution by shifts."""
    c = len(mean)
    group = c // heads
    hidden = torch.cat(
        [
            mlp[0].weight[g * group : (g + 1) * group, :, 0] @ mean[g * group : (g + 1) * group]
            for g in range(heads)
        ]
    )
    hidden = hidden + mlp[0].bias
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    kernel = torch.cat(
        [
            mlp[2].weight[9 * g * group : 9 * (g + 1) * group, :, 0] @ hidden[g * group : (g + 1) * group]
            for g in range(heads)
        ]
    )
    kernel = (kernel + mlp[2].bias).reshape(c, 3, 3)
    height, width = image.shape[:2]
    padded = F.pad(image, (0, 0, 1, 1, 1, 1))
    return sum(padded[i : i + height, j : j + width] * kernel[:, i, j] for i in range(3) for j in range(3))


def transcription(m: InLineAttention, x: Tensor, size: tuple[int, int]) -> Tensor:
    """The card's steps on tokens (b, [1 +] n, c)."""
    ahead, c, rows = x.shape[1] - size[0] * size[1], m.dim, []
    for tokens in x:
        q, k, v = ((tokens @ m.qkv.weight.T + m.qkv.bias)[:, i * c : (i + 1) * c] for i in range(3))  # 1
        q, k = FEATURES[m.features](q), FEATURES[m.features](k)
        y = literal_heads(q, k, v, m.heads)  # 2
        local = literal_local(m.residual, tokens.mean(0), v[ahead:].reshape(*size, c), m.heads)  # 3
        y = torch.cat([y[:ahead], y[ahead:] + local.flatten(0, 1)])
        rows.append(y @ m.proj.weight.T + m.proj.bias)  # 4
    return torch.stack(rows)


def assert_same_with_gradients(ours: Tensor, literal: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, literal)
    up = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, up), torch.autograd.grad(literal, leaves, up)
    )


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (5, 2)])
def test_equals_transcription_with_gradients(features, size):
    torch.manual_seed(0)
    m = InLineAttention(12, heads=3, features=features, dtype=torch.float64)
    with torch.no_grad():
        m.qkv.weight.mul_(3)
    x = torch.randn(2, 12, *size, dtype=torch.float64, requires_grad=True)
    literal = transcription(m, x.flatten(2).transpose(1, 2), size).transpose(1, 2).unflatten(2, size)
    assert_same_with_gradients(m(x), literal, [x, *m.parameters()])


@pytest.mark.parametrize("size", [None, (2, 8)])
def test_class_token_equals_transcription_with_gradients(size):
    torch.manual_seed(0)
    m = InLineAttentionDeiT(12, heads=3, dtype=torch.float64)
    x = torch.randn(2, 17, 12, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(m(x, size=size), transcription(m, x, size or (4, 4)), [x, *m.parameters()])


def test_cswin_branch_equals_transcription_with_gradients():
    torch.manual_seed(0)
    m = InLineAttentionCSwin(12, heads=3, dtype=torch.float64)
    q, k, v = (torch.randn(2, 12, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mean = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    rows = []
    for b in range(2):
        y = literal_heads(*(t[b].flatten(1).T for t in (q, k, v)), heads=3).reshape(3, 5, 12)
        image = v[b].movedim(0, -1)
        padded = F.pad(image, (0, 0, 1, 1, 1, 1))
        lepe = sum(
            padded[i : i + 3, j : j + 5] * m.lepe.weight[:, 0, i, j] for i in range(3) for j in range(3)
        )
        y = y + lepe + m.lepe.bias + literal_local(m.residual, mean[b], image, 3)
        rows.append(y.movedim(-1, 0))
    assert_same_with_gradients(m(q, k, v, mean), torch.stack(rows), [q, k, v, mean, *m.parameters()])


def test_gradcheck():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5))
    v = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(inline_attention, (q, k, v))


def test_weights_sum_to_one_and_tell_q_from_2q():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 6, 4, dtype=torch.float64), torch.randn(1, 1, 9, 4, dtype=torch.float64)
    eye = torch.eye(9, dtype=torch.float64)[None, None]
    once, twice = inline_attention(q, k, eye), inline_attention(2 * q, k, eye)
    for weights in (once, twice):
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 6, dtype=torch.float64))
    assert (once - twice).abs().amax(-1).min() > 1e-3
    constant = torch.randn(1, 1, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(
        inline_attention(q, k, constant.expand(1, 1, 9, 5)), constant.expand(1, 1, 6, 5)
    )


def test_parameter_count():
    # qkv, proj, and the two grouped layers of the predicted kernel
    count = (64 * 192 + 192) + (64 * 64 + 64) + (64 * 16 + 64) + (576 * 16 + 576)
    assert sum(p.numel() for p in InLineAttention(64, heads=4).parameters()) == count
    without = InLineAttention(64, heads=4, qkv_bias=False)
    assert sum(p.numel() for p in without.parameters()) == count - 192


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    m = InLineAttention(12, heads=3, dropout=0.5)
    x = torch.randn(1, 12, 4, 5)
    assert 0.2 < (m(x) == 0).float().mean() < 0.8
    assert (m.eval()(x) != 0).all()


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 5, must divide dim"):
        InLineAttention(12, heads=5)
    with pytest.raises(ValueError, match="features is 'gelu', must be one of 'identity'"):
        InLineAttention(12, heads=3, features="gelu")
    with pytest.raises(ValueError, match="x has 16 tokens, must have 10: a class token and a map of 3 x 3"):
        InLineAttentionDeiT(12, heads=3)(torch.randn(1, 16, 12))
    with pytest.raises(ValueError, match="x has 0 tokens"):
        InLineAttentionDeiT(12, heads=3)(torch.randn(1, 0, 12))
    v = torch.randn(1, 12, 3, 3)
    with pytest.raises(ValueError, match=r"mean has shape \(1, 6\), must be \(1, 12\)"):
        InLineAttentionCSwin(12, heads=3)(v, v, v, torch.randn(1, 6))
