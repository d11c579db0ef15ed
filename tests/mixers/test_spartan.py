from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful.mixers.grid.spartan import MultiOrderSpatialMixer, WaveChannelMixer


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def norm_act(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        t.view(-1, 1, 1) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return gelu((x - mean) / (var + 1e-6).sqrt() * weight + bias)


def linear(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], x) + layer.bias[:, None, None]


def gated(se: nn.Module, x: Tensor) -> Tensor:
    z = linear(se.fc2, linear(se.fc1, x.mean((2, 3), keepdim=True)).clamp(min=0))
    return x / (1 + (-z).exp())


def random(m: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn_like(p))
        for name, b in m.named_buffers():
            if name.endswith("mean"):
                b.normal_()
            elif name.endswith("var"):
                b.uniform_(0.5, 2)
    return m.eval()


def smixer(m: MultiOrderSpatialMixer, x: Tensor) -> Tensor:
    z = linear(m.proj_in, x)
    z = z + m.gamma * (z - z.mean((2, 3), keepdim=True))
    groups = z.shape[1] // m.near[0].weight.shape[1]
    near = norm_act(m.near[1], F.conv2d(z, m.near[0].weight, padding=1, groups=groups))
    wide = F.conv2d(z, m.wide[0].weight, padding=2, dilation=2, groups=groups)
    wide = F.conv2d(wide, m.wide[1][0].weight, padding=2, dilation=2, groups=groups)
    wide = norm_act(m.wide[1][1], wide)
    return linear(m.proj_out, torch.cat([gated(m.near_gate, near), gated(m.wide_gate, wide)], 1))


def cmixer(m: WaveChannelMixer, x: Tensor) -> Tensor:
    theta, w = gelu(linear(m.theta, x)), linear(m.weight, x)
    images = []
    for b in range(x.shape[0]):
        pixels = []
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                strongest = int(x[b, :, i, j].argmax())
                product = w[b, :, i, j] * theta[b, :, i, j]
                pixels.append(product + product[strongest])
        images.append(torch.stack(pixels, 1).unflatten(1, x.shape[2:]))
    f = torch.stack(images)
    numbers = torch.complex(m.turn[:, 0], m.turn[:, 1])
    turned = torch.complex(f[:, 0::2], f[:, 1::2]) * numbers[:, None, None]
    f = torch.stack([turned.real, turned.imag], 2).flatten(1, 2)
    weight = m.conv[0].weight
    f = norm_act(m.conv[1], F.conv2d(f, weight, padding=1, groups=f.shape[1] // weight.shape[1]))
    return linear(m.proj_out, gated(m.gate, f))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
    ("cls", "options", "literal"),
    [(MultiOrderSpatialMixer, {}, smixer), (WaveChannelMixer, {"expand": 3}, cmixer)],
)
def test_equals_transcription_with_gradients(cls, options, literal, depthwise):
    m = random(cls(16, depthwise=depthwise, **options, dtype=torch.float64))
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64, requires_grad=True)
    ours, wanted = m(x), literal(m, x)
    torch.testing.assert_close(ours, wanted)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(wanted, wrt, up))


def test_turning():
    m = random(WaveChannelMixer(8, dtype=torch.float64))
    waves = torch.randn(2, 32, 3, 4, dtype=torch.float64)
    lengths = m.turned(waves).unflatten(1, (16, 2)).norm(dim=2)
    wanted = waves.unflatten(1, (16, 2)).norm(dim=2) * m.turn.norm(dim=1)[:, None, None]
    torch.testing.assert_close(lengths, wanted)
    with torch.no_grad():
        m.turn.copy_(torch.tensor([1.0, 0.0]))
    assert torch.equal(m.turned(waves), waves)


def test_of_equal_channels_the_first_is_the_strongest():
    m = random(WaveChannelMixer(8, dtype=torch.float64))
    x = torch.randn(1, 8, 1, 1, dtype=torch.float64)
    x[:, 3] = x[:, 6] = 9.0
    first, last = x.clone(), x.clone()
    first[:, 3] += 1e-9
    last[:, 6] += 1e-9
    torch.testing.assert_close(m(x), m(first))
    assert not torch.allclose(m(x), m(last))


def test_gamma_starts_small_and_turns_at_random():
    assert bool((MultiOrderSpatialMixer(16).gamma == 1e-5).all())
    assert 0.8 < float(WaveChannelMixer(64).turn.detach().std()) < 1.2  # of 256 numbers


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="dim is 12, must be a multiple of 8"):
        MultiOrderSpatialMixer(12)
    with pytest.raises(ValueError, match="dim is 6, must be a multiple of 4"):
        WaveChannelMixer(6)
    with pytest.raises(ValueError, match="expand is 0, must be a whole number"):
        WaveChannelMixer(8, expand=0)
