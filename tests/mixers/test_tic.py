"""MSA-Conv, one pixel at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful.mixers.grid.tic import MSAConv2d
from heedful.ops.attention import attention
from heedful.patterns.neighborhood import Neighborhood


def build(dim, **options):
    torch.manual_seed(0)
    return MSAConv2d(dim, **options, dropout=0.0, dtype=torch.float64)


@pytest.mark.parametrize(("kernel", "dilation", "heads", "stride"), [(3, 2, 2, 1), ((5, 1), 1, 1, 2)])
def test_equals_transcription_with_gradients(kernel, dilation, heads, stride):
    mixer = build(4, dim_out=6, heads=heads, kernel_size=kernel, dilation=dilation, stride=stride)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    d = 4 // heads
    rows = []
    for image in x:
        projected = torch.einsum("oc,chw->ohw", mixer.qkv.weight[:, :, 0, 0], image)
        q, k, v = (projected + mixer.qkv.bias[:, None, None]).split(4)
        pixels = []
        for r in range(5):
            for c in range(6):
                places = [
                    (r + dilation * (i - high // 2), c + dilation * (j - wide // 2))
                    for i in range(high)
                    for j in range(wide)
                ]
                out = []
                for h in range(heads):
                    own = slice(h * d, (h + 1) * d)
                    total, gathered = 0, torch.zeros(d, dtype=torch.float64)
                    for i, j in places:
                        if 0 <= i < 5 and 0 <= j < 6:
                            weight = (q[own, r, c] @ k[own, i, j] / d**0.5).exp()
                            gathered = gathered + weight * v[own, i, j]
                        else:
                            weight = 1
                        total = total + weight
                    out.append(gathered / total)
                pixels.append(torch.cat(out))
        rows.append(torch.stack(pixels, 1).view(4, 5, 6) + image)
    wanted = F.conv2d(torch.stack(rows), mixer.conv.weight, stride=stride, padding=(high // 2, wide // 2))
    wanted, y = wanted.clamp(min=0), mixer(x)
    torch.testing.assert_close(y, wanted)
    leaves, up = (x, *mixer.parameters()), torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(z, leaves, up) for z in (y, wanted)))


def test_a_window_of_one_pixel_gives_the_values():
    mixer = build(3, kernel_size=1)
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    z, weights = mixer.attend(x)
    torch.testing.assert_close(weights, torch.ones_like(weights))
    torch.testing.assert_close(z, mixer.qkv(x)[:, 6:])


def test_constant_keys_give_equal_weights_inside_of_the_map():
    mixer = build(3)
    torch.nn.init.zeros_(mixer.qkv.weight[3:6])
    _, weights = mixer.attend(torch.randn(1, 3, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(
        weights[..., 1:-1, 1:-1], torch.full((1, 1, 9, 2, 3), 1 / 9, dtype=torch.float64)
    )


def test_interior_equals_neighborhood_attention():
    mixer = build(6, heads=2)
    x = torch.randn(1, 6, 5, 7, dtype=torch.float64)
    q, k, v = (y.flatten(2).unflatten(1, (2, 3)).mT for y in mixer.qkv(x).chunk(3, 1))
    y = attention(q, k, v, pattern=Neighborhood((5, 7), (3, 3), (1, 1), (1, 1)))
    z, _ = mixer.attend(x)
    inside = y.mT.flatten(1, 2).unflatten(2, (5, 7))[..., 1:-1, 1:-1]
    torch.testing.assert_close(z[..., 1:-1, 1:-1], inside)


def test_parameter_count():
    assert sum(p.numel() for p in MSAConv2d(6, dim_out=4).parameters()) == 18 * 7 + 4 * 6 * 9


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="kernel_size is 4, must be odd"):
        MSAConv2d(6, kernel_size=4)
    with pytest.raises(ValueError, match="dilation is 0"):
        MSAConv2d(6, dilation=0)
