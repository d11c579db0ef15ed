from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.mixers.grid.van_lka import LargeKernelAttention


def shifted_sum(x: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1) -> Tensor:
    """A depthwise convolution as a sum of shifted maps."""
    height, width = x.shape[2:]
    side = weight.shape[-1]
    pad = side // 2 * dilation
    padded = F.pad(x, (pad, pad, pad, pad))
    y = bias[:, None, None].expand_as(x)
    for i in range(side):
        for j in range(side):
            top, left = i * dilation, j * dilation
            y = y + weight[:, 0, i, j][:, None, None] * padded[:, :, top : top + height, left : left + width]
    return y


def transcription(m: LargeKernelAttention, x: Tensor) -> Tensor:
    a = shifted_sum(x, m.conv0.weight, m.conv0.bias)
    a = shifted_sum(a, m.conv_spatial.weight, m.conv_spatial.bias, m.dilation)
    a = torch.einsum("oc,bchw->bohw", m.conv1.weight[:, :, 0, 0], a) + m.conv1.bias[:, None, None]
    return x * a


@pytest.mark.parametrize(
    ("options", "sides", "size"),
    [
        ({}, (5, 7), (13, 12)),
        ({}, (5, 7), (1, 2)),
        ({"kernel": 9, "dilation": 2}, (3, 5), (4, 11)),
        ({"kernel": 3, "dilation": 1}, (1, 3), (5, 4)),
    ],
)
def test_equals_transcription_with_gradients(options, sides, size):
    torch.manual_seed(0)
    m = LargeKernelAttention(6, **options, dtype=torch.float64)
    assert (m.conv0.weight.shape[-1], m.conv_spatial.weight.shape[-1]) == sides
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    ours, literal = m(x), transcription(m, x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


def test_gradcheck():
    torch.manual_seed(0)
    m = LargeKernelAttention(2, kernel=6, dilation=2, dtype=torch.float64)
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(m, (x,))


def test_a_token_is_gated_by_23_x_23_tokens():
    torch.manual_seed(0)
    m = LargeKernelAttention(2, dtype=torch.float64)
    x = torch.randn(1, 2, 29, 31, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(m(x)[0, 0, 14, 15], x)
    rows, columns = gradient[0].abs().sum(0).nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 25, 4, 26)
    assert len(rows) == 23**2


def test_identity_where_the_map_is_one():
    m = LargeKernelAttention(4, dtype=torch.float64)
    with torch.no_grad():
        m.conv1.weight.zero_()
        m.conv1.bias.fill_(1)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    assert torch.equal(m(x), x)


def test_translation_inside_zero_borders():
    torch.manual_seed(0)
    m = LargeKernelAttention(3, dtype=torch.float64)
    x = F.pad(torch.randn(1, 3, 4, 5, dtype=torch.float64), (13, 13, 13, 13))
    with torch.no_grad():
        m.conv0.bias.zero_()  # otherwise a border shows
    torch.testing.assert_close(m(x.roll((1, -2), (2, 3))), m(x).roll((1, -2), (2, 3)))


def test_parameter_count():
    assert sum(p.numel() for p in LargeKernelAttention(64).parameters()) == 64 * (26 + 50) + 64 * 65


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match=r"kernel is 23, must make ceil\(kernel / 3\) odd, not 8"):
        LargeKernelAttention(8, kernel=23)
    with pytest.raises(ValueError, match="dilation is 0, must be a whole number"):
        LargeKernelAttention(8, dilation=0)
