"""Layer-wise relevance propagation against loops, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from heedful import inspect as look


def by_loops(layer, x, r):
    """The rules for one sample, one sum at a time."""
    out = torch.zeros_like(x)
    y = layer(x[None])[0]
    if isinstance(layer, nn.Linear):
        for o in range(len(r)):
            v = layer.weight[o].clamp(min=0)
            z = sum(x[i] * v[i] for i in range(len(x))) + 1e-9
            for i in range(len(x)):
                out[i] += x[i] * v[i] * r[o] / z
    elif isinstance(layer, nn.Conv2d):
        (s,), (p,) = set(layer.stride), set(layer.padding)
        for o, row, column in torch.cartesian_prod(*map(torch.arange, r.shape)).tolist():
            share = r[o, row, column] / (y[o, row, column] + 1e-9)
            for c, dy, dx in torch.cartesian_prod(*map(torch.arange, layer.weight.shape[1:])).tolist():
                i, j = row * s + dy - p, column * s + dx - p
                if 0 <= i < x.shape[1] and 0 <= j < x.shape[2]:
                    out[c, i, j] += x[c, i, j] * layer.weight[o, c, dy, dx] * share
    elif isinstance(layer, nn.MaxPool2d):
        k, s = layer.kernel_size, layer.stride
        for c, row, column in torch.cartesian_prod(*map(torch.arange, r.shape)).tolist():
            window = x[c, row * s : row * s + k, column * s : column * s + k]
            i, j = divmod(int(window.argmax()), k)
            won = x[c, row * s + i, column * s + j]
            out[c, row * s + i, column * s + j] += won * r[c, row, column] / (y[c, row, column] + 1e-9)
    else:
        out = r.reshape(x.shape)
    return out


def test_relevance_by_loops():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        nn.Conv2d(3, 2, 2),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).double()
    x = torch.randn(2, 2, 13, 13, dtype=torch.float64)
    before = x.clone()
    logits, relevance = look.lrp_cnn(net, x)
    assert torch.equal(x, before)
    torch.testing.assert_close(logits, net.eval()(x))
    chain = [*net[0], *list(net)[1:]]
    with torch.no_grad():
        for row in range(2):
            steps = [x[row]]
            for layer in chain:
                steps.append(layer(steps[-1].clone()[None])[0])
            r = torch.zeros(4, dtype=torch.float64)
            r[logits[row].argmax()] = logits[row].max()
            for layer, given in zip(reversed(chain), reversed(steps[:-1]), strict=True):
                r = by_loops(layer, given, r)
            torch.testing.assert_close(relevance[row], r, rtol=1e-9, atol=1e-12)


def test_what_is_conserved():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    x, start = torch.rand(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    hidden = linear[0](x).relu()
    kept = (hidden @ linear[2].weight.clamp(min=0).T > 0).all(1)  # where something can carry it
    _, r = look.lrp_cnn(linear, x, start)
    assert kept.all()
    torch.testing.assert_close(r.sum(1), start.sum(1), rtol=1e-6, atol=1e-6)  # eps is 1e-9
    pool = nn.Sequential(nn.MaxPool2d(3, 2), nn.Flatten())  # windows overlap; winners get all their shares
    x, start = torch.rand(2, 3, 7, 7, dtype=torch.float64) + 1, torch.randn(2, 27, dtype=torch.float64)
    _, r = look.lrp_cnn(pool, x, start)
    torch.testing.assert_close(r.sum((1, 2, 3)), start.sum(1), rtol=1e-7, atol=1e-7)
    # A convolution loses the share of its bias.
    conv = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()).double()
    start = torch.randn(2, 50, dtype=torch.float64)
    y, r = look.lrp_cnn(conv, x, start)
    lost = (start / (y + 1e-9) * (conv[0].bias.repeat_interleave(25) + 1e-9)).sum(1)
    torch.testing.assert_close(start.sum(1) - r.sum((1, 2, 3)), lost, rtol=1e-9, atol=1e-9)


@pytest.mark.door
def test_errors_at_the_door():
    with pytest.raises(ValueError, match="layers hold a BatchNorm2d"):
        look.lrp_cnn([nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)], torch.zeros(1, 1, 2, 2))
