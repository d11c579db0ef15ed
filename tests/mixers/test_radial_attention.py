from __future__ import annotations

import itertools

import pytest
import torch
from tests.test_patterns_video import radial
from torch import Tensor

import heedful
from heedful.mixers.grid.radial_attention import RadialAttention
from heedful.patterns.radial import Radial


def dense(mixer: torch.nn.Module, x: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Projected attention of a map's tokens, head by head, where `seen` (n, n) says what is visible."""
    y = torch.zeros_like(x)
    width = mixer.dim // mixer.heads
    for b in range(len(x)):
        tokens = x[b].flatten(1).T
        q, k, v = (tokens @ mixer.qkv.weight.T + mixer.qkv.bias).chunk(3, -1)
        heads = []
        for h in range(mixer.heads):
            own = slice(h * width, (h + 1) * width)
            weight = (q[:, own] @ k[:, own].T * scale).exp() * seen
            heads.append(weight / weight.sum(-1, keepdim=True) @ v[:, own])
        y[b] = (torch.cat(heads, -1) @ mixer.proj.weight.T + mixer.proj.bias).T.view_as(x[b])
    return y


@pytest.mark.parametrize(
    ("size", "options", "pattern"),
    [
        ((4, 3, 5), {"block_size": 5}, Radial((4, 15), 0.2, 5, True)),
        ((6, 2, 4), {"block_size": 4, "decay": 0.95, "sink_frame": False}, Radial((6, 8), 0.95, 4)),
        ((3, 8, 9), {"block_size": 16}, Radial((3, 72), 0.2, 16, True)),
        ((5, 2, 2), {}, Radial((5, 4), 0.2, 4, True)),  # a block is at most a frame
    ],
)
def test_equals_transcription_with_gradients(size: tuple, options: dict, pattern: Radial) -> None:
    torch.manual_seed(0)
    mixer = RadialAttention(12, heads=2, dtype=torch.float64, **options)
    x = torch.randn(2, 12, *size, dtype=torch.float64, requires_grad=True)
    seen = radial(pattern)
    assert not seen.all()
    assert seen.any(-1).all()
    y, expected = mixer(x), dense(mixer, x, seen, 6**-0.5)
    torch.testing.assert_close(y, expected)
    wrt, up = (x, *mixer.parameters()), torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, wrt, up), torch.autograd.grad(expected, wrt, up))


def test_one_frame_is_full_attention() -> None:
    mixer = RadialAttention(16, heads=4, block_size=8, dtype=torch.float64)
    x = torch.randn(1, 16, 1, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), dense(mixer, x, torch.ones(48, 48, dtype=torch.bool), 0.5))


def test_what_a_token_sees_grows_with_the_logarithm_of_the_length() -> None:
    mixer = heedful.create("radial-attention", dim=16, sink_frame=False)
    seen = []  # as many frames' worth of tokens
    for frames in (16, 32, 64, 128):
        pattern = mixer.pattern((frames, 16, 64))
        seen.append(pattern.block_table(frames * 1024).visited() * frames)
    assert seen[0] > 6
    for short, long in itertools.pairwise(seen):
        assert short < long < short + 6


def test_parameter_count() -> None:
    assert sum(p.numel() for p in RadialAttention(24, heads=4).parameters()) == 4 * 24 * 25


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="heads is 5, must divide dim"):
        RadialAttention(16, heads=5)
    with pytest.raises(ValueError, match="decay is 0"):
        RadialAttention(16, decay=0)
    with pytest.raises(ValueError, match="block_size is 0"):
        RadialAttention(16, block_size=0)
    with pytest.raises(ValueError, match="x has shape"):
        RadialAttention(16)(torch.zeros(1, 16, 3, 3))
