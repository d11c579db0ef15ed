from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.mixers.grid.mambaout import GatedCNN


def transcription(m: GatedCNN, x: Tensor) -> Tensor:
    """Of one (c, height, width) map: the convolution tap by tap, the rest token by token."""
    height, width = x.shape[1:]
    hidden, same, conv = m.split
    z = {}
    for i in range(height):
        for j in range(width):
            t = x[:, i, j] - x[:, i, j].mean()
            t = t / (t.square().mean() + 1e-6).sqrt() * m.norm.weight + m.norm.bias
            z[i, j] = m.fc1.weight @ t + m.fc1.bias
    y = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            g, s = z[i, j][:hidden], z[i, j][hidden : hidden + same]
            channels = []
            if conv:
                half = m.conv.weight.shape[-1] // 2
                c = m.conv.bias
                for p in range(-half, half + 1):
                    for q in range(-half, half + 1):
                        if (i + p, j + q) in z:
                            tap = m.conv.weight[:, 0, p + half, q + half]
                            c = c + tap * z[i + p, j + q][hidden + same :]
                channels = [c]
            gate = g * 0.5 * (1 + torch.erf(g / 2**0.5))
            y[:, i, j] = m.fc2.weight @ (gate * torch.cat([s, *channels])) + m.fc2.bias
    return y


@pytest.mark.parametrize("how", [{}, {"conv_ratio": 0.5, "kernel": 3}, {"conv_ratio": 0}, {"expansion": 1}])
def test_equals_transcription_with_gradients(how):
    torch.manual_seed(0)
    m = GatedCNN(5, **how, dtype=torch.float64)
    for p in m.parameters():
        p.data.normal_()
    x = torch.randn(2, 5, 5, 4, dtype=torch.float64, requires_grad=True)
    ours, theirs = m(x), torch.stack([transcription(m, one) for one in x])
    torch.testing.assert_close(ours, theirs)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(theirs, wrt, up))


def test_without_convolution_tokens_stand_alone():
    m = GatedCNN(6, conv_ratio=0)
    x = torch.randn(1, 6, 3, 4)
    torch.testing.assert_close(m(x)[:, :, 1:2, 2:3], m(x[:, :, 1:2, 2:3]))


def test_parameter_count():
    m = GatedCNN(16)  # 42 hidden channels
    assert m.split == (42, 26, 16)
    assert sum(p.numel() for p in m.parameters()) == 32 + 17 * 84 + 16 * 50 + 43 * 16


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="kernel is 4, must be odd"):
        GatedCNN(8, kernel=4)
    for ratio in (-1, 3):
        with pytest.raises(ValueError, match=f"conv_ratio is {ratio}"):
            GatedCNN(8, conv_ratio=ratio)
