from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful.mixers.grid.bevanet import (
    ComprehensiveKernelSelection,
    LargeSeparableKernelAttention,
    SparseDecomposedLargeSeparableKernelAttention,
)


def strip(x: Tensor, layer: nn.Conv2d, dilation: int, vertical: bool) -> Tensor:
    """A sum of shifted maps."""
    weight = layer.weight.flatten(1)
    reach = dilation * (weight.shape[1] // 2)
    wide = F.pad(x, (0, 0, reach, reach) if vertical else (reach, reach, 0, 0))
    y = layer.bias[:, None, None].expand_as(x)
    for tap in range(weight.shape[1]):
        part = wide.narrow(2 if vertical else 3, tap * dilation, x.shape[2 if vertical else 3])
        y = y + weight[:, tap, None, None] * part
    return y


def linear(x: Tensor, layer: nn.Conv2d) -> Tensor:
    return torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], x) + layer.bias[:, None, None]


def squeeze(x: Tensor, part: nn.Sequential) -> Tensor:
    """x (b, c, 1, 1): of the 3 x 3 convolution the middle alone sees it."""
    conv, depthwise, norm, _ = part
    y = linear(x, conv)[:, :, 0, 0] * depthwise.weight[:, 0, 1, 1] + depthwise.bias
    y = (y - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
    return y.clamp(min=0)[:, :, None, None]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def selection(m: ComprehensiveKernelSelection, maps: list[Tensor]) -> Tensor:
    total = sum(maps)
    reduced = squeeze(total.mean((2, 3), keepdim=True), m.reduce)
    seen = torch.stack([total.mean(1), total.max(1)[0]], 1)
    places = sigmoid(F.conv2d(seen, m.places.weight, m.places.bias, padding=3))
    y = torch.zeros_like(total)
    for k in range(3):
        y = y + maps[k] * sigmoid(squeeze(reduced, m.expand[k])) * places[:, k : k + 1]
    return y


def random(m: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(0.7 * torch.randn_like(p))
        for name, b in m.named_buffers():
            if name.endswith("mean"):
                b.normal_()
            elif name.endswith("var"):
                b.uniform_(0.5, 2)
    return m.eval()


def agree(m: nn.Module, x: Tensor, wanted: Tensor) -> None:
    ours = m(x)
    torch.testing.assert_close(ours, wanted)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(wanted, wrt, up))


@pytest.mark.parametrize(("kernel", "dilation"), [(7, 2), (11, 2), (23, 3), (35, 3), (41, 3), (53, 3)])
def test_lska_equals_transcription_with_gradients(kernel, dilation):
    m = random(LargeSeparableKernelAttention(3, kernel=kernel, dtype=torch.float64))
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64, requires_grad=True)
    a = strip(strip(x, m.near_row, 1, False), m.near_column, 1, True)
    a = strip(strip(a, m.far_row, dilation, False), m.far_column, dilation, True)
    agree(m, x, x * linear(a, m.mix))


@pytest.mark.parametrize(("kernel", "dilation"), [(7, 2), (11, 2), (23, 3), (35, 3)])
def test_sdlska_equals_transcription_with_gradients(kernel, dilation):
    m = random(SparseDecomposedLargeSeparableKernelAttention(3, kernel=kernel, dtype=torch.float64))
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64, requires_grad=True)
    s = F.conv2d(x, m.near.weight, m.near.bias, padding=m.near.weight.shape[-1] // 2, groups=3)
    maps = [s, strip(s, m.row, dilation, False), strip(s, m.column, dilation, True)]
    agree(m, x, x * linear(selection(m.select, maps), m.mix))


@pytest.mark.parametrize("kernel", [7, 11, 23, 35])
def test_reach(kernel):
    """An output reads `kernel` pixels along each axis, and the corners of that square not."""
    m = random(SparseDecomposedLargeSeparableKernelAttention(2, kernel=kernel, dtype=torch.float64))
    x = torch.randn(1, 2, 61, 61, dtype=torch.float64, requires_grad=True)
    near = m.near(x)
    (grad,) = torch.autograd.grad((m.row(near) + m.column(near))[0, :, 30, 30].sum(), x)
    rows, columns = grad[0].abs().sum(0).nonzero().T
    assert (int(rows.min()), int(rows.max())) == (30 - kernel // 2, 30 + kernel // 2)
    assert (int(columns.min()), int(columns.max())) == (30 - kernel // 2, 30 + kernel // 2)
    assert not grad[0, :, 30 - kernel // 2, 30 - kernel // 2].any()


def test_selection_of_zero_weights_is_a_quarter_of_the_sum():
    m = ComprehensiveKernelSelection(4).double().eval()
    for p in m.parameters():
        nn.init.zeros_(p)
    maps = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(m(*maps), maps.sum(0) / 4)


def test_parameter_counts():
    m = SparseDecomposedLargeSeparableKernelAttention(1024, kernel=35)
    hidden = 1024 // 16
    select = hidden * 1024 + hidden * (1 + 10 + 2) + 3 * (hidden * 1024 + 1024 * 13) + 3 * 99
    count = 1024 * 26 + 2 * 1024 * 12 + select + 1024 * 1024 + 1024
    assert sum(p.numel() for p in m.parameters()) == count
    assert ComprehensiveKernelSelection(64).reduce[0].out_channels == 32


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="kernel is 41, must be one of 7, 11, 23, 35"):
        SparseDecomposedLargeSeparableKernelAttention(8, kernel=41)
    with pytest.raises(ValueError, match="kernel is 9, must be one of 7, 11, 23, 35, 41, 53"):
        LargeSeparableKernelAttention(8, kernel=9)
