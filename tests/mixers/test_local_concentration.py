from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful.mixers.grid.local_concentration import LocalConcentration


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """49 shifted copies, zeros around."""
    height, width = x.shape[2:]
    padded = F.pad(x, (3, 3, 3, 3))
    y = sum(
        padded[:, :, i : i + height, j : j + width] * conv.weight[:, 0, i, j, None, None]
        for i in range(7)
        for j in range(7)
    )
    return y + conv.bias[:, None, None]


def transcription(m: LocalConcentration, x: Tensor) -> Tensor:
    y = depthwise(m.conv1, x)
    y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    if m.training:
        mean = y.mean((0, 2, 3), keepdim=True)
        variance = ((y - mean) ** 2).mean((0, 2, 3), keepdim=True)
    else:
        mean, variance = (t[:, None, None] for t in (m.bn.running_mean, m.bn.running_var))
    y = (y - mean) / (variance + 1e-5).sqrt() * m.bn.weight[:, None, None] + m.bn.bias[:, None, None]
    return depthwise(m.conv2, y)


@pytest.mark.parametrize("training", [True, False])
def test_equals_transcription_with_gradients(training):
    torch.manual_seed(0)
    m = LocalConcentration(5, dtype=torch.float64).train(training)
    with torch.no_grad():
        for t in (m.bn.weight, m.bn.bias, m.bn.running_mean):
            t.normal_()
        m.bn.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 5, 9, 4, dtype=torch.float64, requires_grad=True)
    literal, ours = transcription(m, x), m(x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


def test_parameter_count():
    assert sum(p.numel() for p in LocalConcentration(24).parameters()) == 2 * (49 * 24 + 24) + 2 * 24
