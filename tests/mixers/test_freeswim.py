from __future__ import annotations

import math

import pytest
import torch
from tests.mixers.test_radial_attention import dense
from tests.test_patterns_video import inward

from heedful.mixers.grid.freeswim import InwardWindowAttention
from heedful.patterns.inward_window import InwardWindow


@pytest.mark.parametrize(
    ("size", "native", "half"),
    [((2, 6, 7), (3, 4), (1, 2)), ((3, 5, 4), (2, 2), (1, 1)), ((1, 4, 9), (30, 5), (15, 2))],
)
def test_equals_transcription_with_gradients(size: tuple, native: tuple, half: tuple) -> None:
    torch.manual_seed(0)
    mixer = InwardWindowAttention(12, heads=2, native=native, dtype=torch.float64)
    x = torch.randn(2, 12, *size, dtype=torch.float64, requires_grad=True)
    seen = inward(InwardWindow(size, half))
    assert not seen.all()
    scale = (math.log(2 * 30 * 52) / math.log(30 * 52) / 6) ** 0.5
    y, expected = mixer(x), dense(mixer, x, seen, scale)
    torch.testing.assert_close(y, expected)
    wrt, up = (x, *mixer.parameters()), torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, wrt, up), torch.autograd.grad(expected, wrt, up))


def test_the_training_size_is_attended_to_whole() -> None:
    mixer = InwardWindowAttention(8, heads=2, native=(4, 6), dtype=torch.float64)
    x = torch.randn(1, 8, 2, 4, 6, dtype=torch.float64)
    seen = torch.ones(48, 48, dtype=torch.bool)
    torch.testing.assert_close(mixer(x), dense(mixer, x, seen, mixer.scale))


def test_windows_are_one_token_wider_than_a_training_frame_of_even_sides() -> None:
    pattern = InwardWindowAttention(16).pattern((1, 68, 120))
    seen = pattern.visible(*(torch.tensor(0) for _ in range(3)), torch.arange(68 * 120))
    assert int(seen.sum()) == 31 * 53


def test_parameter_count() -> None:
    assert sum(p.numel() for p in InwardWindowAttention(24, heads=4).parameters()) == 4 * 24 * 25


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="heads is 5, must divide dim"):
        InwardWindowAttention(16, heads=5)
    with pytest.raises(ValueError, match=r"native is \(3,\)"):
        InwardWindowAttention(16, native=(3,))
    with pytest.raises(ValueError, match=r"native\[1\] is 0"):
        InwardWindowAttention(16, native=(3, 0))
