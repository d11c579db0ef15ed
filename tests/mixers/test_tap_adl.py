"""Token-aware pooling, channel processing, the diversification loss: transcriptions and special cases."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.mixers.channel.fan import ChannelProcessing
from heedful.mixers.grid.tap import TokenAwarePooling, spread_mean
from heedful.ops.attention_diversity import attention_diversification_loss


def shaken(mixer):
    torch.manual_seed(0)
    mixer.double().eval()
    for name, value in mixer.state_dict().items():
        if value.is_floating_point():
            value.add_(0.3 * torch.randn_like(value))
            if name.endswith("running_var"):
                value.abs_().add_(0.2)
    return mixer


def near(x, i, j):
    """Token (i, j) of a map (c, height, width), zeros outside."""
    inside = 0 <= i < x.shape[1] and 0 <= j < x.shape[2]
    return x[:, i, j] if inside else torch.zeros(x.shape[0], dtype=x.dtype)


def conv(x, weight):
    """3 x 3, zeros outside, tap by tap."""
    rows = []
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            taps = [weight[:, :, a, b] @ near(x, i + a - 1, j + b - 1) for a in range(3) for b in range(3)]
            rows.append(sum(taps))
    return torch.stack(rows, -1).unflatten(-1, x.shape[1:])


def batch_norm(x, bn):
    column = (slice(None), None, None)
    y = (x - bn.running_mean[column]) / (bn.running_var[column] + 1e-5).sqrt()
    return y * bn.weight[column] + bn.bias[column]


def compare(mixer, x, expected):
    torch.testing.assert_close(mixer(x), expected)
    leaves = [x, *mixer.parameters()]
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), leaves) for y in (mixer(x), expected))
    torch.testing.assert_close(ours, theirs)


def test_pooling_equals_transcription():
    pool = shaken(TokenAwarePooling(3, scales=4))
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    images = []
    for image in x:
        first, bn, last = pool.proj
        logits = conv(batch_norm(conv(image, first.weight), bn), last.weight)
        shares = logits.exp() / logits.exp().sum(0)
        y = torch.stack(
            [
                shares[0, i, j] * image[:, i, j]
                + sum(
                    shares[k, i, j] * near(image, i + a * k, j + b * k) / 9
                    for k in (1, 2, 3)
                    for a in (-1, 0, 1)
                    for b in (-1, 0, 1)
                )
                for i in range(4)
                for j in range(6)
            ],
            -1,
        )
        images.append(y.unflatten(-1, (4, 6)))
    compare(pool, x, torch.stack(images))


def test_one_scale_is_the_identity_and_borders_shrink():
    x = torch.randn(1, 5, 4, 4)
    assert torch.equal(TokenAwarePooling(5, scales=1)(x), x)
    y = spread_mean(torch.ones(1, 1, 7, 7), 2)[0, 0]
    torch.testing.assert_close(y[2:5, 2:5], torch.ones(3, 3))
    torch.testing.assert_close(y[0, 0], torch.tensor(4 / 9))
    torch.testing.assert_close(y[0, 3], torch.tensor(6 / 9))


def test_parameters_of_pooling():
    for dim, scales in ((16, 4), (7, 3)):
        pool = TokenAwarePooling(dim, scales=scales)
        count = sum(p.numel() for p in pool.parameters())
        assert count == 9 * dim * scales + 9 * scales**2 + 2 * scales


def test_channel_processing_equals_transcription():
    mixer = shaken(ChannelProcessing(6, heads=2, hidden=5, eps=1e-3))
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    images = []
    for image in x:
        tokens = image.flatten(1).T
        q = tokens @ mixer.query.weight.T + mixer.query.bias
        gates = []
        for c in range(6):
            head = c // 3
            share = q[:, c].exp() / q[:, c].exp().sum()
            key = tokens[:, 3 * head : 3 * head + 3].exp()
            key = (key / key.sum(0)).mean(1)
            gates.append(mixer.temperature[head] / (1 + (-(share * key).sum()).exp()))
        h = (tokens @ mixer.fc1.weight.T + mixer.fc1.bias).T.unflatten(1, (3, 4))
        y = conv(h, torch.diag_embed(mixer.conv1.weight[:, 0].movedim(0, -1)).permute(2, 3, 0, 1))
        y = y + mixer.conv1.bias[:, None, None]
        y = batch_norm(y * (1 + torch.erf(y / math.sqrt(2))) / 2, mixer.bn)
        y = conv(y, torch.diag_embed(mixer.conv2.weight[:, 0].movedim(0, -1)).permute(2, 3, 0, 1))
        y = y + mixer.conv2.bias[:, None, None]
        h = (h + mixer.gamma[:, None, None] * y).flatten(1).T
        v = h @ mixer.fc2.weight.T + mixer.fc2.bias
        v = v - v.mean(1, keepdim=True)
        v = v / (v.square().mean(1, keepdim=True) + 1e-3).sqrt() * mixer.norm.weight + mixer.norm.bias
        images.append((torch.stack(gates) * v).T.unflatten(1, (3, 4)))
    compare(mixer, x, torch.stack(images))


def test_loss_equals_transcription():
    torch.manual_seed(0)
    maps = [(3 * torch.randn(2, 3, n, n, dtype=torch.float64)).softmax(-1).requires_grad_() for n in (7, 5)]
    total = 0
    for weights in maps:
        n = weights.shape[-1]
        for b in range(2):
            a = weights[b].mean(0)
            mean = sum(a[i] for i in range(n)) / n
            mean = mean * (mean > 1.5 / n)
            for i in range(n):
                row = a[i] * (a[i] > 1.5 / n)
                total = total + (mean @ row) / (mean.norm() * row.norm()) / (2 * n)
    total = total / (2 + 1e-6)
    loss = attention_diversification_loss(maps, threshold=1.5)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(*(torch.autograd.grad(y, maps, retain_graph=True) for y in (loss, total)))


def test_special_cases_of_the_loss():
    uniform = torch.full((1, 2, 9, 9), 1 / 9)
    same = torch.zeros(2, 4, 9, 9)
    same[..., 3] = 1
    identity = torch.eye(9).expand(1, 2, 9, 9)
    assert attention_diversification_loss([uniform]) == 0
    torch.testing.assert_close(attention_diversification_loss([same, same]), torch.tensor(1.0))
    assert attention_diversification_loss([identity]) == 0
    torch.testing.assert_close(attention_diversification_loss([same, identity]), torch.tensor(0.5))


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="scales is 0"):
        TokenAwarePooling(4, scales=0)
    with pytest.raises(ValueError, match="hidden is 0"):
        ChannelProcessing(4, heads=2, hidden=0)
    with pytest.raises(ValueError, match="heads is 3, must divide dim"):
        ChannelProcessing(4, heads=3)
    with pytest.raises(ValueError, match="maps is empty"):
        attention_diversification_loss([])
