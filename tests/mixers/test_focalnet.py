from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.mixers.grid.focalnet import FocalModulation


def gelu(t: Tensor) -> Tensor:
    return t * (1 + torch.erf(t / math.sqrt(2))) / 2


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """A depthwise convolution of a map with the channels last, as a sum of shifted maps."""
    height, width = x.shape[:2]
    side = weight.shape[-1]
    pad = side // 2
    padded = F.pad(x, (0, 0, pad, pad, pad, pad))
    return sum(
        padded[i : i + height, j : j + width] * weight[:, 0, i, j] for i in range(side) for j in range(side)
    )


def transcription(m: FocalModulation, x: Tensor) -> Tensor:
    """The numbered steps, one image at a time with the channels last."""
    dim, images = m.dim, []
    for image in x.movedim(1, -1):
        parts = image @ m.f.weight.T + m.f.bias
        q, context, gates = parts[..., :dim], parts[..., dim : 2 * dim], parts[..., 2 * dim :]
        total = torch.zeros_like(q)
        for level in range(m.levels):
            context = gelu(convolved(context, m.focal_layers[level][0].weight))
            total = total + context * gates[..., level : level + 1]
        total = total + gelu(context.sum((0, 1)) / (q.shape[0] * q.shape[1])) * gates[..., m.levels :]
        if m.normalize_modulator:
            total = total / (m.levels + 1)
        y = q * (total @ m.h.weight[:, :, 0, 0].T + m.h.bias)
        if m.ln is not None:
            mean = y.mean(-1, keepdim=True)
            spread = ((y - mean) ** 2).mean(-1, keepdim=True) + 1e-5
            y = (y - mean) / spread.sqrt() * m.ln.weight + m.ln.bias
        images.append(y @ m.proj.weight.T + m.proj.bias)
    return torch.stack(images).movedim(-1, 1)


@pytest.mark.parametrize(
    ("options", "sides", "size"),
    [
        ({}, [3, 5, 7], (6, 8)),
        ({"levels": 2, "window": 5, "factor": 4}, [5, 9], (3, 4)),
        ({"normalize_modulator": True}, [3, 5, 7], (1, 1)),
        ({"postln": True, "normalize_modulator": True}, [3, 5, 7], (5, 2)),
        ({"levels": 0}, [], (3, 5)),
    ],
)
def test_equals_transcription_with_gradients(options, sides, size):
    torch.manual_seed(0)
    m = FocalModulation(6, **options, dtype=torch.float64)
    assert [layer[0].weight.shape[-1] for layer in m.focal_layers] == sides
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn_like(p) / 2)
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    ours, literal = m(x), transcription(m, x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


def test_gradcheck():
    torch.manual_seed(0)
    m = FocalModulation(2, levels=2, dtype=torch.float64)
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(m, (x,))


def test_gate_rows_scale_the_modulator():
    torch.manual_seed(0)
    m = FocalModulation(4, dtype=torch.float64)
    with torch.no_grad():
        m.h.bias.zero_()
        m.proj.bias.zero_()
        x = torch.randn(1, 4, 6, 5, dtype=torch.float64)
        before = m(x)
        m.f.weight[8:].mul_(-3)
        m.f.bias[8:].mul_(-3)
    torch.testing.assert_close(m(x), -3 * before)


def test_without_the_last_gate_the_reach_is_that_of_the_chained_convolutions():
    torch.manual_seed(0)
    m = FocalModulation(3, dtype=torch.float64)
    x = torch.randn(1, 3, 19, 21, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(m(x)[0, 0, 9, 10], x)
    assert (gradient != 0).all()
    with torch.no_grad():
        m.f.weight[-1].zero_()
        m.f.bias[-1].zero_()
    (gradient,) = torch.autograd.grad(m(x)[0, 0, 9, 10], x)
    rows, columns = gradient[0].abs().sum(0).nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 15, 4, 16)  # 1 + 2 (1 + 2 + 3)


@pytest.mark.parametrize(("postln", "extra"), [(False, 0), (True, 128)])
def test_parameter_count(postln, extra):
    m = FocalModulation(64, postln=postln)
    count = 65 * (2 * 64 + 4) + 64 * (9 + 25 + 49) + 2 * 64 * 65 + extra
    assert sum(p.numel() for p in m.parameters()) == count


@pytest.mark.door
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "window is 4, must be odd"),
        ({"factor": 1}, "factor is 1, must be even"),
        ({"levels": -1}, "levels is -1, must be a whole number of at least 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FocalModulation(8, **options)
