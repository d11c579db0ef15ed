from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.test_patterns_video import split
from torch import Tensor

from heedful.mixers.grid.ultragen import GlobalLocalVideoAttention
from heedful.patterns.split_windows import SplitWindows


def turn(x: Tensor, place: list[float]) -> Tensor:
    """Rotary position embedding of one head's vector: a third of the pairs for each axis."""
    pairs = len(x) // 6
    y = x.clone()
    for axis in range(3):
        for j in range(pairs):
            at = 2 * (axis * pairs + j)
            angle = place[axis] * 10000 ** (-j / pairs)
            u, v = x[at].clone(), x[at + 1].clone()
            y[at] = u * math.cos(angle) - v * math.sin(angle)
            y[at + 1] = u * math.sin(angle) + v * math.cos(angle)
    return y


def attend(m: GlobalLocalVideoAttention, x: Tensor, windows: int, cell: int, level=None) -> Tensor:
    """Attention of one video (c, t, h, w) inside windows; cells of cell x cell tokens."""
    size = tuple(x.shape[1:])
    tokens = x.flatten(1).T
    qkv = tokens @ m.qkv.weight.T + m.qkv.bias
    if level is not None:
        down = level.down.weight.chunk(3)
        qkv = qkv + torch.cat([tokens @ down[i].T @ level.up[i].T for i in range(3)], -1)
    places = [
        [t, y * cell + (cell - 1) / 2, z * cell + (cell - 1) / 2]
        for t in range(size[0])
        for y in range(size[1])
        for z in range(size[2])
    ]
    seen = split(SplitWindows(size, (1, windows, windows)))
    width = m.dim // m.heads
    heads = []
    for h in range(m.heads):
        q, k, v = (part[:, h * width : (h + 1) * width] for part in qkv.chunk(3, -1))
        q, k = (torch.stack([turn(row, place) for row, place in zip(t, places, strict=True)]) for t in (q, k))
        weight = (q @ k.T / width**0.5).exp() * seen
        heads.append(weight / weight.sum(-1, keepdim=True) @ v)
    return (torch.cat(heads, -1) @ m.proj.weight.T + m.proj.bias).T.view_as(x)


def compressed(m: GlobalLocalVideoAttention, x: Tensor, level, windows: int) -> Tensor:
    k = m.compress
    c, t, height, width = x.shape
    rows, columns = -(-height // k), -(-width // k)
    pooled = torch.zeros(c, t, rows, columns, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            for a in range(k):
                for b in range(k):
                    at = x[:, :, min(i * k + a, height - 1), min(j * k + b, width - 1)]
                    pooled[:, :, i, j] = pooled[:, :, i, j] + level.conv.weight[:, 0, 0, a, b, None] * at
    z = attend(m, pooled, windows, k, level)
    up = F.interpolate(z.transpose(0, 1), size=(rows * k, columns * k), mode="bilinear", align_corners=False)
    return up.transpose(0, 1)[..., :height, :width]


def transcription(
    m: GlobalLocalVideoAttention, x: Tensor, time: list[float], windows: int, coarse: int
) -> Tensor:
    rows = []
    for one, t in zip(x, time, strict=True):
        angles = [t / 10000 ** (j / 128) for j in range(128)]
        sinusoids = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=x.dtype)
        gates = []
        for gate in (m.coarse_gate, m.whole_gate):
            hidden = gate[0].weight @ sinusoids + gate[0].bias
            hidden = hidden / (1 + (-hidden).exp())
            gates.append(1 / (1 + (-(gate[2].weight @ hidden + gate[2].bias)).exp()))
        near, far = (g[:, None, None, None] for g in gates)
        local = attend(m, one, windows, 1)
        local = near * compressed(m, one, m.coarse, coarse) + (1 - near) * local
        whole = F.conv3d(compressed(m, one, m.whole, 1)[None], m.refine.weight, padding=1, groups=m.dim)[0]
        rows.append(far * whole + (1 - far) * local)
    return torch.stack(rows)


def mixer(dim: int = 16, heads: int = 2, **options) -> GlobalLocalVideoAttention:
    torch.manual_seed(0)
    m = GlobalLocalVideoAttention(dim, heads=heads, rank=3, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in m.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return m


@pytest.mark.parametrize(
    ("size", "options", "windows", "coarse"),
    [
        ((2, 4, 6), {"windows": 2, "compress": 2}, 2, 1),
        ((2, 5, 7), {"windows": 2, "compress": 2, "layer": 3}, 3, 2),
        ((1, 9, 6), {"windows": 4, "compress": 3, "layer": 2}, 4, 2),
    ],
)
def test_equals_transcription_with_gradients(size: tuple, options: dict, windows: int, coarse: int) -> None:
    m = mixer(**options)
    x = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    time = torch.tensor([731.0, 12.5], dtype=torch.float64)
    y, expected = m(x, timestep=time), transcription(m, x, time.tolist(), windows, coarse)
    torch.testing.assert_close(y, expected)
    wrt, up = (x, *m.parameters()), torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, wrt, up), torch.autograd.grad(expected, wrt, up))


def test_closed_gates_and_one_window_are_full_attention() -> None:
    m = mixer(windows=1, compress=2)
    with torch.no_grad():
        for gate in (m.coarse_gate, m.whole_gate):
            gate[2].weight.zero_()
            gate[2].bias.fill_(-1e4)
    x = torch.randn(1, 16, 2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(m(x)[0], attend(m, x[0], 1, 1))


def test_compression_starts_as_an_average_and_refinement_as_nothing() -> None:
    m = GlobalLocalVideoAttention(8, heads=2, windows=2, compress=2, rank=4, dtype=torch.float64)
    x = torch.randn(2, 8, 3, 6, 8, dtype=torch.float64)
    for level in (m.coarse, m.whole):
        torch.testing.assert_close(level.pool(x), F.avg_pool3d(x, (1, 2, 2)))
        assert not level.low_rank(x.flatten(2).transpose(1, 2)).any()
    assert torch.equal(m.refine(x), x)


def test_no_timestep_is_zero() -> None:
    m = mixer(windows=2, compress=2)
    x = torch.randn(2, 16, 1, 4, 4, dtype=torch.float64)
    assert torch.equal(m(x), m(x, timestep=torch.zeros(2, dtype=torch.float64)))
    assert not torch.allclose(m(x), m(x, timestep=torch.full((2,), 500.0, dtype=torch.float64)))


def test_parameter_count() -> None:
    m = GlobalLocalVideoAttention(12, heads=2, windows=2, compress=4, rank=5)
    base = 4 * 12 * 13
    level = 12 * 16 + 3 * 2 * 12 * 5
    gate = 257 * 12 + 13 * 12
    assert sum(p.numel() for p in m.parameters()) == base + 2 * level + 2 * gate + 27 * 12


@pytest.mark.door
def test_errors() -> None:
    options = {"windows": 2, "compress": 2, "rank": 2}
    with pytest.raises(ValueError, match="heads is 5, must divide dim"):
        GlobalLocalVideoAttention(16, heads=5, **options)
    for name in options:
        with pytest.raises(ValueError, match=f"{name} is 0"):
            GlobalLocalVideoAttention(16, **{**options, name: 0})
    with pytest.raises(ValueError, match=r"timestep has shape \(3,\), must be \(2,\)"):
        GlobalLocalVideoAttention(16, **options)(torch.zeros(2, 16, 1, 2, 2), timestep=torch.zeros(3))
